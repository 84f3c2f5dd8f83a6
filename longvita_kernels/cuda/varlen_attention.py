"""Attention over packed documents in CUDA C++ for Hopper (equations: ops/varlen_attention.py; kernels: csrc/cuda/attention_*.cuh).

Nothing is read back to the host. T: tokens, H, J: query and KV heads, D: head dimension.
"""

import torch

from longvita_kernels import native
from longvita_kernels.cuda import native_cuda
from longvita_kernels.ops import _common

# The backward makes dq in the same pass as dk and dv (five products instead of seven) where its float32 sums of dq, and all other scratch,
# take no more than this: 131,072 tokens of 40 heads of 128 take 2.5 GiB, a million 20 GiB. 0: never. The two ways round differently.
SINGLE_PASS_BYTES = 4 << 30


def cannot(q, k, v, softcap):
    """Why the kernels do not take tensors like these, or None; all that is not of values."""
    entries = torch.zeros(1, dtype=torch.int32, device="cpu")  # its address alone matters: there are no documents
    problem = _problem(q, k, v, entries, entries, 1.0, -1, -1, softcap, q.dtype)
    with native_cuda.current(q.device):
        return native_cuda.load().varlen_attention_cannot(problem) or None


def forward(q, k, v, cu_q, cu_k, scale, left, right, softcap, *, out=None):
    """out (T, H, D), lse (H, T) and its rest, float32. `out` may be given in float32, for partial results; scale > 0."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse, rest = (torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device) for _ in range(2))
    problem = _problem(q, k, v, cu_q, cu_k, scale, left, right, softcap, out.dtype)
    scratch = _scratch(problem, False, q.device)
    native_cuda.call(
        "varlen_attention_forward", q.device, problem, out.data_ptr(), lse.data_ptr(), rest.data_ptr(), scratch.data_ptr(), scratch.numel()
    )
    return out, lse, rest


def backward(
    grad_out, grad_lse, q, k, v, out, lse, rest, cu_q, cu_k, scale, left, right, softcap, dq, dk, dv, *, add=False, single_pass=None
):
    """Write the gradients into dq, dk and dv, dense, all in q's dtype or in float32, or None where not needed; `add`: onto what is there.

    out, lse    of the whole attention, also where k and v are a part of the keys. rest has the strides of lse
    grad_out, grad_lse   None: that output is not used
    single_pass          whether dq is made in the same pass as dk and dv, where all are wanted; None: as SINGLE_PASS_BYTES allows
    """
    grads = (dq, dk, dv)
    result = next((grad.dtype for grad in grads if grad is not None), None)
    if result is None:
        return
    grad_out, out = _followed(torch.zeros_like(out) if grad_out is None else grad_out), _followed(out)
    problem = _problem(q, k, v, cu_q, cu_k, scale, left, right, softcap, result)
    if single_pass is None:
        single_pass = native_cuda.load().varlen_attention_scratch(problem, True, True) <= SINGLE_PASS_BYTES
    single_pass = single_pass and dq is not None and (dk is not None or dv is not None)
    scratch = _scratch(problem, True, q.device, single_pass)
    native_cuda.call(
        "varlen_attention_backward", q.device, problem, *_common.pointer_and_strides(out, 2), lse.data_ptr(), rest.data_ptr(), lse.stride(),
        *_common.pointer_and_strides(grad_out, 2), *_common.pointer_and_strides(grad_lse, 2),
        [0 if grad is None else grad.data_ptr() for grad in grads], add, single_pass, scratch.data_ptr(), scratch.numel(),
    )  # fmt: skip


def _problem(q, k, v, cu_q, cu_k, scale, left, right, softcap, result):
    return native_cuda.load().VarlenProblem(
        native.dtype_code(q.dtype), native.dtype_code(result), q.data_ptr(), tuple(q.shape), q.stride()[:2], k.data_ptr(), tuple(k.shape),
        k.stride()[:2], v.data_ptr(), v.stride()[:2], cu_q.data_ptr(), cu_k.data_ptr(), len(cu_q), scale, softcap, left, right,
    )  # fmt: skip


def _scratch(problem, backward, device, single_pass=False):
    return torch.empty(native_cuda.load().varlen_attention_scratch(problem, backward, single_pass), dtype=torch.uint8, device=device)


def _followed(x):
    """x, or a dense copy where its rows do not begin at multiples of 16 bytes: the copy engine follows no others."""
    return x if x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2]) else x.contiguous()
