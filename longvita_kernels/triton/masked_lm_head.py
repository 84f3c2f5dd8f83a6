"""masked_lm_head on Triton: the rows are read through the index, forward and backward; see longvita_kernels.ops.masked_lm_head."""

import torch
import triton
import triton.language as tl

from longvita_kernels.ops import _common, _gemm
from longvita_kernels.triton import _matmul
from longvita_kernels.triton._compile import CAPABILITIES, spec


def forward(hidden, weight, rows):
    """→ logits (M, V) = hidden[rows] · weightᵀ. Made transposed: the vocabulary fills whole tiles, however few rows there are."""
    logits = hidden.new_empty(rows.shape[0], weight.shape[0])
    if hidden.shape[0] == 0:
        return logits.zero_()  # nothing that a row could be clamped to
    _matmul.matmul(weight, hidden.T, logits.T, index=rows.contiguous(), along="N")
    return logits


def backward(grad, hidden, weight, rows, needs):
    """→ gradients of hidden (T, H), where a row that was asked for several times gets the sum, and of weight (V, H)."""
    rows = (rows.clamp(0, hidden.shape[0] - 1) if hidden.shape[0] else rows[:0]).contiguous()
    grad = _gemm.dense_rows(grad[: rows.shape[0]])
    grad_hidden, grad_weight = _common.absent(hidden), _common.absent(weight)
    if needs[0]:
        grad_hidden = hidden.new_zeros(hidden.shape)
        grad_rows = hidden.new_empty(rows.shape[0], hidden.shape[1], dtype=torch.float32)
        _matmul.matmul(grad, weight, grad_rows)
        _add_rows(grad_rows, rows, grad_hidden)
    if needs[1]:
        grad_weight = weight.new_empty(weight.shape)
        _matmul.matmul(grad.T, hidden, grad_weight, index=rows, along="K")
    return grad_hidden, grad_weight


_BLOCK_H = 1024


@triton.jit
def add_rows_kernel(grad_rows, sorted_rows, order, out, M, H, BLOCK: tl.constexpr):
    """out[row] = Σ grad_rows[order[i]] over the run of sorted positions i that hold this row, in the caller's order."""
    first = tl.program_id(0)
    row = tl.load(sorted_rows + first)
    before = tl.load(sorted_rows + first - 1, mask=first > 0, other=-1)
    if row != before:  # this program stands at the start of a run
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        at, here = first, row
        while here == row:
            acc += tl.load(grad_rows + tl.load(order + at) * H + column, mask=column < H, other=0.0)
            at += 1
            here = tl.load(sorted_rows + at, mask=at < M, other=-1)
        tl.store(out + row * H + column, _matmul.rounded(acc, out.dtype.element_ty), mask=column < H)


def _add_rows(grad_rows, rows, out):
    sorted_rows, order = rows.sort(stable=True)  # on the device, and the same order of sums in every run
    M, H = grad_rows.shape
    if M:
        add_rows_kernel[(M, triton.cdiv(H, _BLOCK_H))](grad_rows, sorted_rows, order, out, M, H, BLOCK=_BLOCK_H, num_warps=4)


def compile_specs():
    """What `make cuda-check` compiles."""
    for capability in CAPABILITIES:
        for dtype in (torch.bfloat16, torch.float32):
            forward_ = {"a_dense": "k", "b_dense": "k", "c_dense": "m", "c_dtype": dtype, "along": "N"}
            yield _matmul.matmul_spec("masked_lm_head forward", capability, dtype, **forward_)
            yield _matmul.matmul_spec("masked_lm_head forward, few rows", capability, dtype, columns=1, **forward_)
            yield _matmul.matmul_spec("masked_lm_head grad rows", capability, dtype, a_dense="k", b_dense="n")
            yield _matmul.matmul_spec("masked_lm_head grad weight", capability, dtype, a_dense="m", b_dense="n", c_dtype=dtype, along="K")
        types = {"*fp32": "grad_rows", "*i64": "sorted_rows order", "*bf16": "out", "i32": "M H"}
        yield spec("masked_lm_head add rows", add_rows_kernel, capability, types, {"BLOCK": _BLOCK_H}, unaligned=("M",))
