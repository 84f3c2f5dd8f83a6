"""Data parallelism over torch.distributed, one parameter copy per rank. Without a process group every function is the identity.

Gradients are sums over supervised tokens; one number of tokens, counted over all ranks, divides them afterwards. So the result does not
depend on how the rows are spread over ranks and accumulation steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def sum_numbers(values: list[float], device: torch.device) -> list[float]:
    """Elementwise sum over ranks, in float64 (exact for token counts)."""
    if not is_distributed():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(value) -> list:
    """`value` of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: Iterable[nn.Parameter], bucket_elements: int = 1 << 24) -> None:
    """Sums the gradients over ranks in place, in flat buckets of at most 64 MiB (or one larger gradient)."""
    if not is_distributed():
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and sum(grad.numel() for grad in bucket) + parameter.numel() > bucket_elements:
            _sum_bucket(bucket)
            bucket = []
        bucket.append(parameter.grad)
    _sum_bucket(bucket)


def _sum_bucket(grads: list[Tensor]) -> None:
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    pieces = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [piece.view_as(grad) for piece, grad in zip(pieces, grads, strict=True)])


def broadcast_parameters(parameters: Iterable[Tensor]) -> None:
    """Gives every rank the parameters of rank 0."""
    if is_distributed():
        for parameter in parameters:
            dist.broadcast(parameter.detach(), src=0)
