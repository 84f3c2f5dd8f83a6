"""A vocabulary spread over the processes of a torch.distributed group: joining what each has found, with gradients."""

import torch
import torch.distributed as dist


def total(size, device, group):
    """Sum of an integer over the group."""
    count = torch.tensor(size, dtype=torch.int64, device=device)
    dist.all_reduce(count, group=group)
    return int(count)


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the group, in float32 whatever its dtype."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        summed = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.group)
        return summed.to(grad.dtype), None


def sum_gradient(tensor, group):
    """The tensor itself; its gradient comes back summed over the group. Every process holds the same tensor."""
    return _SumGradient.apply(tensor, group)


class _JoinStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, statistics, group):
        lse, target, sums, largest, _ = statistics
        top = torch.stack((lse, largest))
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        added = torch.stack(((lse - top[0]).exp(), target, sums))
        dist.all_reduce(added, group=group)
        joined = torch.stack((top[0] + added[0].log(), added[1], added[2], top[1], added[0] * (top[0] - top[1]).exp()))
        ctx.save_for_backward((lse - joined[0]).exp())
        return joined

    @staticmethod
    def backward(ctx, grad):
        (share,) = ctx.saved_tensors
        return torch.stack((grad[0] * share, grad[1], grad[2], torch.zeros_like(share), torch.zeros_like(share))), None


def join_statistics(statistics, group):
    """(5, T) of this process's part of the vocabulary (lse, label's logit or 0, sum and maximum of the logits l, Σ exp(l − maximum)) →
    those of the whole.

    The gradient that comes in is the same in every process, and each takes its own part's share of it.
    """
    return _JoinStatistics.apply(statistics, group)
