"""Combination of two partial attentions on Triton, forward and backward (equations: ops/merge_attention.py). One pass over memory each.

A program takes R rows, a row being one token and head: row = token · H + head.
"""

import torch
import triton
import triton.language as tl

from longvita_kernels.triton import _launch
from longvita_kernels.triton._compile import CAPABILITIES, CompileSpec

_ROWS = 8
_COUNTS = ("rows",)


@triton.jit
def _weights(lse_a_ptr, a_head, a_token, lse_b_ptr, b_head, b_token, head, token, inside):
    """(w_a, w_b, lse, a saw something, b did): the partial results' shares; 0, 0, −inf where both saw nothing."""
    a = tl.load(lse_a_ptr + head * a_head + token * a_token, mask=inside, other=float("-inf"))
    b = tl.load(lse_b_ptr + head * b_head + token * b_token, mask=inside, other=float("-inf"))
    peak = tl.maximum(a, b)
    nothing = peak == float("-inf")
    base = tl.where(nothing, 0.0, peak)
    of_a, of_b = tl.exp(a - base), tl.exp(b - base)
    total = tl.where(nothing, 1.0, of_a + of_b)
    lse = tl.where(nothing, float("-inf"), base + tl.log(total))
    return tl.div_rn(of_a, total), tl.div_rn(of_b, total), lse, a != float("-inf"), b != float("-inf")


@triton.jit
def _rows(R: tl.constexpr, rows, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """(head, token, row is there, columns, element is there)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    return row % HEADS, row // HEADS, row < rows, column, (row < rows)[:, None] & (column < DIM)


@triton.jit
def _load(ptr, token_stride, head_stride, token, head, column, mask):
    return tl.load(ptr + (token * token_stride + head * head_stride)[:, None] + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, values, token, head, column, mask, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Into a dense (T, H, D)."""
    tl.store(ptr + ((token * HEADS + head) * DIM)[:, None] + column, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def forward_kernel(
    a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr, lse_ptr,
    a_stride, a_head, b_stride, b_head, lse_a_head, lse_a_stride, lse_b_head, lse_b_stride, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    head, token, inside, column, mask = _rows(R, rows, HEADS, DIM, BLOCK_DIM)
    w_a, w_b, lse, sees_a, sees_b = _weights(lse_a_ptr, lse_a_head, lse_a_stride, lse_b_ptr, lse_b_head, lse_b_stride, head, token, inside)
    a = _load(a_ptr, a_stride, a_head, token, head, column, mask & sees_a[:, None])
    b = _load(b_ptr, b_stride, b_head, token, head, column, mask & sees_b[:, None])
    _store(out_ptr, w_a[:, None] * a + w_b[:, None] * b, token, head, column, mask, HEADS, DIM)
    tl.store(lse_ptr + head * (rows // HEADS) + token, lse, mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def backward_kernel(
    grad_ptr, grad_lse_ptr, a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, grad_a_ptr, grad_lse_a_ptr, grad_b_ptr, grad_lse_b_ptr,
    grad_stride, grad_head, grad_lse_head, grad_lse_stride,
    a_stride, a_head, b_stride, b_head, lse_a_head, lse_a_stride, lse_b_head, lse_b_stride, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, R: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    NEED_A: tl.constexpr, NEED_LSE_A: tl.constexpr, NEED_B: tl.constexpr, NEED_LSE_B: tl.constexpr,
):  # fmt: skip
    """d lse_a = w_a · (g · (out_a − out) + g_lse), and out_a − out = w_b · (out_a − out_b)."""
    head, token, inside, column, mask = _rows(R, rows, HEADS, DIM, BLOCK_DIM)
    w_a, w_b, _, sees_a, sees_b = _weights(lse_a_ptr, lse_a_head, lse_a_stride, lse_b_ptr, lse_b_head, lse_b_stride, head, token, inside)
    grad, apart, grad_lse = tl.zeros([R, BLOCK_DIM], tl.float32), tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    if HAS_GRAD:
        grad += _load(grad_ptr, grad_stride, grad_head, token, head, column, mask)
        if NEED_LSE_A or NEED_LSE_B:
            both = mask & (sees_a & sees_b)[:, None]
            a = _load(a_ptr, a_stride, a_head, token, head, column, both)
            b = _load(b_ptr, b_stride, b_head, token, head, column, both)
            apart += tl.sum(tl.where(both, grad, 0.0) * (a - b), 1)
    if HAS_GRAD_LSE:
        grad_lse += tl.load(grad_lse_ptr + head * grad_lse_head + token * grad_lse_stride, mask=inside, other=0.0)
    at = head * (rows // HEADS) + token
    if NEED_A:
        _store(grad_a_ptr, tl.where(sees_a[:, None], w_a[:, None] * grad, 0.0), token, head, column, mask, HEADS, DIM)
    if NEED_B:
        _store(grad_b_ptr, tl.where(sees_b[:, None], w_b[:, None] * grad, 0.0), token, head, column, mask, HEADS, DIM)
    if NEED_LSE_A:
        tl.store(grad_lse_a_ptr + at, tl.where(sees_a, w_a * (w_b * apart + grad_lse), 0.0), mask=inside)
    if NEED_LSE_B:
        tl.store(grad_lse_b_ptr + at, tl.where(sees_b, w_b * (grad_lse - w_a * apart), 0.0), mask=inside)


# -------------------------------------------------------------------------------------------------------------------------------- launches


def forward(out_a, lse_a, out_b, lse_b, out, lse):
    """Write out (T, H, D) and lse (H, T), both dense."""
    rows = out.shape[0] * out.shape[1]
    if rows:
        forward_kernel[(triton.cdiv(rows, _ROWS),)](
            out_a, lse_a, out_b, lse_b, out, lse, *out_a.stride()[:2], *out_b.stride()[:2], *lse_a.stride(), *lse_b.stride(), rows,
            **_shape(out),
        )  # fmt: skip


def backward(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, grads):
    """Write the gradients of the four inputs, each dense, or None where not needed; grad_out, grad_lse: None if unused."""
    rows = out_a.shape[0] * out_a.shape[1]
    grad, grad_lse_ = out_a if grad_out is None else grad_out, lse_a if grad_lse is None else grad_lse
    written = [given if wanted is None else wanted for given, wanted in zip((out_a, lse_a, out_b, lse_b), grads, strict=True)]
    needs = dict(zip(("NEED_A", "NEED_LSE_A", "NEED_B", "NEED_LSE_B"), (wanted is not None for wanted in grads), strict=True))
    if rows and any(needs.values()):
        backward_kernel[(triton.cdiv(rows, _ROWS),)](
            grad, grad_lse_, out_a, lse_a, out_b, lse_b, *written, *grad.stride()[:2], *grad_lse_.stride(),
            *out_a.stride()[:2], *out_b.stride()[:2], *lse_a.stride(), *lse_b.stride(), rows,
            **_shape(out_a), HAS_GRAD=grad_out is not None, HAS_GRAD_LSE=grad_lse is not None, **needs,
        )  # fmt: skip


def _shape(out):
    return {"HEADS": out.shape[1], "DIM": out.shape[2], "BLOCK_DIM": _launch.power_of_2(out.shape[2]), "R": _ROWS, "num_warps": 4}


def compile_specs():
    """What `make cuda-check` compiles."""
    shape = {"HEADS": 40, "DIM": 128, "BLOCK_DIM": 128, "R": _ROWS}
    needs = dict.fromkeys(("HAS_GRAD", "HAS_GRAD_LSE", "NEED_A", "NEED_LSE_A", "NEED_B", "NEED_LSE_B"), True)
    for capability in CAPABILITIES:
        for dtype, kind in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
            for kernel, constexprs in ((forward_kernel, shape), (backward_kernel, shape | needs)):
                names = [name for name in kernel.arg_names if name not in constexprs]
                yield CompileSpec(
                    name=f"merge_attention {kernel.__name__}, {dtype}", kernel=kernel,
                    signature={n: ("*fp32" if "lse" in n else kind) if n.endswith("_ptr") else "i32" for n in names},
                    constexprs=constexprs, num_warps=4, num_stages=3, matrix=False, capability=capability,
                    aligned=tuple(n for n in names if n.endswith("_ptr") or ("lse" not in n and n != "rows")),
                )  # fmt: skip
