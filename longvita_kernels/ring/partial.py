"""Attention to some of the keys, float32 out, and the gradients of these keys' share: what a step of the ring computes.

Our kernels do both in one call whatever the inputs' dtype; elsewhere plain torch, document by document. For the gradients `out` and
`lse` are those of the whole attention, so that the shares of all steps add up to its gradients (equations: ops/varlen_attention.py).

T: packed tokens. H, J: query heads, KV heads. D: head dimension. L: tokens of one document.
"""

import torch

from longvita_kernels.ops import _common
from longvita_kernels.ops import varlen_attention as varlen


def dtype_of(tensor):
    """What parts are kept in: float32, for float64 that."""
    return _common.compute_dtype(tensor)


def forward(q_THD, k_TJD, v_TJD, call, scale, result):
    """(out in `result`, lse, its rest) of a program's `Call`."""
    cu_q, cu_k, longest_q, longest_k = call.offsets(q_THD.device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    settings = (longest_q, longest_k, scale, call.left, call.right, 0.0, deterministic)
    return varlen._forward_impl(q_THD, k_TJD, v_TJD, cu_q, cu_k, *settings, result=result)


def backward(grad_out, grad_lse, q, k, v, out, lse, lse_rest, call, scale, needs):
    """Shares of (dq, dk, dv), float32; absent (no elements) where `needs` says so. Arguments as of the op's backward."""
    cu_q, cu_k, *_ = call.offsets(q.device)
    backend, tensors = varlen.backend_of(q, k, v, scale, 0.0), (grad_out, grad_lse, q, k, v, out, lse, lse_rest, cu_q, cu_k)
    if backend == "native":
        return varlen.native_backward(*tensors, scale, call.left, call.right, 0.0, needs, result=torch.float32)
    if backend in ("cuda", "triton"):
        shares = varlen._empty_gradients((q, k, v), needs, torch.float32)
        wanted = [share if need else None for share, need in zip(shares, needs, strict=True)]
        varlen._on_gpu(backend).backward(*tensors, scale, call.left, call.right, 0.0, *wanted)
        return shares
    wide = dtype_of(q)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    inputs = [x.to(wide) for x in (grad_out, grad_lse.T, q, out, lse.T)], [x.to(wide) for x in (k, v)]
    ends_q, ends_k = call.cu_queries.tolist(), call.cu_keys.tolist()
    shares = [
        _document(*(x[a:b] for x in inputs[0]), *(x[c:d] for x in inputs[1]), scale, call.left, call.right)
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    ]
    empty = [x[:0].to(wide) for x in (q, k, v)]
    return [torch.cat([none, *parts]) for none, parts in zip(empty, list(zip(*shares, strict=True)) or [[]] * 3, strict=True)]


def _document(g_LHD, g_lse_LH, q_LHD, out_LHD, lse_LH, k_LJD, v_LJD, scale, left, right):
    kv_heads = k_LJD.shape[1]
    group = q_LHD.shape[1] // kv_heads
    k_LHD, v_LHD = (x.repeat_interleave(group, dim=1) for x in (k_LJD, v_LJD))
    scores_HLL = torch.einsum("qhd,khd->hqk", q_LHD, k_LHD) * scale
    visible_LL = varlen._visible(*scores_HLL.shape[1:], left, right, q_LHD.device)
    lse_HL1 = lse_LH.T.unsqueeze(-1).masked_fill(lse_LH.T.unsqueeze(-1) == -torch.inf, torch.inf)  # a row that saw nothing: P = 0
    p_HLL = torch.exp(scores_HLL - lse_HL1).masked_fill(~visible_LL, 0.0)
    delta_HL1 = ((g_LHD * out_LHD).sum(-1) - g_lse_LH).T.unsqueeze(-1)
    ds_HLL = p_HLL * (torch.einsum("qhd,khd->hqk", g_LHD, v_LHD) - delta_HL1)
    dq_LHD = torch.einsum("hqk,khd->qhd", ds_HLL, k_LHD) * scale
    dk_LHD = torch.einsum("hqk,qhd->khd", ds_HLL, q_LHD) * scale
    dv_LHD = torch.einsum("hqk,qhd->khd", p_HLL, g_LHD)
    return dq_LHD, *(x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk_LHD, dv_LHD))
