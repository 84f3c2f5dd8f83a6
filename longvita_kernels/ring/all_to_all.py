"""Attention with heads exchanged for tokens: every rank gets all tokens of its share of the heads, and attends to them alone.

Two exchanges (q, k and v there, out back) whatever the documents are, and exactly equal work; but every token leaves its rank, and the
ranks must divide the heads. W: ranks. T: tokens of this rank. h: heads a rank gets. Source: Jacobs et al. 2023 "DeepSpeed Ulysses".
"""

import numpy as np
import torch

from longvita_kernels.ops.varlen_attention import varlen_attention


def divides(plan, heads, kv_heads):
    """Whether the plan's ranks divide both head counts."""
    return heads % plan.world_size == 0 and kv_heads % plan.world_size == 0


def bytes_sent(plan, rank, heads, kv_heads, head_dim, dtype, *, backward=False, lse=False):
    """Bytes that the rank sends in one forward (`lse`: which returns that too), or in one backward: the gradients of the same tensors."""
    own = int(plan.tokens[rank])
    inputs = own * (plan.world_size - 1) * (heads + 2 * kv_heads) // plan.world_size * head_dim
    outputs = (plan.total_tokens - own) * heads // plan.world_size
    total = (inputs + outputs * head_dim) * dtype.itemsize + (outputs * 4 if lse else 0)
    if backward:  # what came in goes back, and the other way round
        inputs = (plan.total_tokens - own) * (heads + 2 * kv_heads) // plan.world_size * head_dim
        outputs = own * (plan.world_size - 1) * heads // plan.world_size
        total = (inputs + outputs * head_dim) * dtype.itemsize + (outputs * 4 if lse else 0)
    return total


def attention(q, k, v, plan, group, scale, return_lse):
    """(out, lse or None) of this rank's tokens. Arguments as in `ring_attention`, checked there."""
    heads = [x.shape[1] // plan.world_size for x in (q, k, v)]
    mine = torch.cat([x.unflatten(1, (plan.world_size, -1)) for x in (q, k, v)], dim=2)  # (T, W, h, D): what goes to each rank
    whole = _Exchange.apply(mine, plan, group, True)
    cu_seqlens = torch.from_numpy(plan.documents.offsets.astype(np.int32)).to(q.device)
    longest = int(plan.documents.lengths.max(initial=0))
    out = varlen_attention(
        *whole.split(heads, dim=1), cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, causal=False, softmax_scale=scale,
        window_size=(plan.documents.left, plan.documents.right), return_lse=return_lse,
    )  # fmt: skip
    out, lse = out if return_lse else (out, None)
    out = _Exchange.apply(out, plan, group, False).flatten(1, 2)
    return out, lse if lse is None else _Exchange.apply(lse.T.contiguous(), plan, group, False).flatten(1, 2).T


class _Exchange(torch.autograd.Function):
    """(T, W, h, …) of this rank's tokens → (all tokens, h, …) of its heads, or back. Each is the other's gradient."""

    @staticmethod
    def forward(ctx, x, plan, group, to_heads):
        ctx.plan, ctx.group, ctx.to_heads = plan, group, to_heads
        return (_to_heads if to_heads else _to_tokens)(x, plan, group, "ring_attention, forward")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad = (_to_tokens if ctx.to_heads else _to_heads)(grad, ctx.plan, ctx.group, "ring_attention, backward")
        return grad, None, None, None


def _to_heads(x, plan, group, name):
    parts = [x.new_empty((tokens, *x.shape[2:])) for tokens in plan.tokens.tolist()]
    _swap([x[:, rank].contiguous() for rank in range(plan.world_size)], parts, group, f"{name}, heads for tokens")
    return plan.joined(parts)


def _to_tokens(x, plan, group, name):
    parts = [x.new_empty((int(plan.tokens[group.rank]), *x.shape[1:])) for _ in range(plan.world_size)]
    _swap([plan.shard(x, rank).contiguous() for rank in range(plan.world_size)], parts, group, f"{name}, tokens for heads")
    return torch.stack(parts, dim=1)


def _swap(outgoing, incoming, group, step):
    """outgoing[r] goes to rank r, incoming[r] is filled from there; what has no elements stays."""
    peers = [rank for rank in range(group.size) if rank != group.rank]
    sends = [(rank, outgoing[rank]) for rank in peers if outgoing[rank].numel()]
    transfers = group.exchange(step, sends, [(rank, incoming[rank]) for rank in peers if incoming[rank].numel()])
    incoming[group.rank].copy_(outgoing[group.rank])
    transfers.wait()
    transfers.finish()
