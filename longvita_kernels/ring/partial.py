"""Attention to some of the keys, float32 out, and the gradients of these keys' share: what a step of the ring computes.

Every backend does both in one call whatever the inputs' dtype. For the gradients `out` and `lse` are those of the whole attention, so that
the shares of all steps add up to its gradients (equations: ops/varlen_attention.py).

T: packed tokens. H, J: query heads, KV heads. D: head dimension.
"""

import torch

from longvita_kernels.ops import _common, _varlen_paths
from longvita_kernels.ops import varlen_attention as varlen
from longvita_kernels.ring.ranges import add


def dtype_of(tensor):
    """What parts are kept in: float32, for float64 that."""
    return _common.compute_dtype(tensor)


@_common.on_device
def forward(q_THD, k_TJD, v_TJD, call, scale, result):
    """(out in `result`, lse, its rest) of a program's `Call`."""
    cu_q, cu_k, longest_q, longest_k = call.offsets(q_THD.device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    settings = (longest_q, longest_k, scale, call.left, call.right, 0.0, deterministic)
    return varlen._forward_impl(q_THD, k_TJD, v_TJD, cu_q, cu_k, *settings, result=result)


@_common.on_device
def backward(grad_out, grad_lse, q, k, v, out, lse, lse_rest, call, scale, dq, dk, dv):
    """Adds the shares of the gradients to dq, dk and dv, float32, at the call's queries and keys; None: not needed.

    The other arguments as of the op's backward: rows of the call.
    """
    cu_q, cu_k, *_ = call.offsets(q.device)
    tensors = grad_out, grad_lse, q, k, v, out, lse, lse_rest
    window, targets = (call.left, call.right), ((dq, call.queries), (dk, call.keys), (dv, call.keys))
    needs = [target is not None for target, _ in targets]
    backend = varlen.backend_of(q, k, v, scale, 0.0)
    if backend == "native":
        shares = varlen.native_backward(*tensors, cu_q, cu_k, scale, *window, 0.0, needs, result=torch.float32)
    elif backend == "cuda":
        shares = varlen._empty_gradients((q, k, v), needs, torch.float32)
        wanted = [share if need else None for share, need in zip(shares, needs, strict=True)]
        varlen._on_gpu(backend).backward(*tensors, cu_q, cu_k, scale, *window, 0.0, *wanted)
    elif backend == "triton":
        shares = [None if x is None else _place(x, ranges) for x, ranges in targets]
        varlen._on_gpu(backend).backward(*tensors, cu_q, cu_k, scale, *window, 0.0, *shares, add=True)
        targets = [(None if len(ranges) == 1 else x, ranges) for x, ranges in targets]
    else:
        wide = dtype_of(q)
        if backend == "reference":
            tensors = [None if x is None else x.to(wide) for x in tensors]
        shares = _common.run_reference(_varlen_paths.blocked_backward, *tensors, cu_q, cu_k, scale, *window, 0.0)
    for (target, ranges), share in zip(targets, shares, strict=True):
        if target is not None:
            add(target, ranges, share)


def _place(x, ranges):
    """Rows of x that a kernel may add to: a view where there is one range, else zeros."""
    if len(ranges) == 1:
        return x[ranges[0][0] : ranges[0][1]]
    return x.new_zeros(sum(b - a for a, b in ranges), *x.shape[1:])
