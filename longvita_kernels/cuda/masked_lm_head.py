"""masked_lm_head in CUDA C++: logits of a few rows at the speed of reading the weight (csrc/cuda/lm_head.cu).

More rows are a matrix product, forward as backward: torch's own (cuBLAS) is the fastest there is. T, H: hidden; M: rows; V: vocabulary.
"""

import torch

from longvita_kernels import native
from longvita_kernels.cuda import native_cuda
from longvita_kernels.ops import _common


def forward(hidden, weight, rows):
    """→ logits (M, V) = hidden[rows] · weightᵀ."""
    if hidden.shape[0] == 0:
        return hidden.new_zeros(rows.shape[0], weight.shape[0])  # nothing that a row could be clamped to
    if rows.shape[0] > native_cuda.load().masked_lm_head_rows:
        return torch.nn.functional.linear(hidden[_clamped(rows, hidden)], weight)
    logits = hidden.new_empty(rows.shape[0], weight.shape[0])
    native_cuda.call(
        "masked_lm_head_few_rows", hidden.device, native.dtype_code(hidden.dtype), *hidden.shape, weight.shape[0], rows.shape[0],
        hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0), rows.contiguous().data_ptr(), logits.data_ptr(),
    )  # fmt: skip
    return logits


def backward(grad, hidden, weight, rows, needs):
    """→ gradients of hidden (T, H), where a row that was asked for several times gets the sum, and of weight (V, H)."""
    rows = _clamped(rows, hidden)
    grad = grad[: rows.shape[0]]
    grad_hidden, grad_weight = _common.absent(hidden), _common.absent(weight)
    if needs[0]:
        grad_hidden = hidden.new_zeros(hidden.shape)
        grad_hidden.index_put_((rows,), grad @ weight, accumulate=True)  # sorts, so that repeated rows are added up in one order
    if needs[1]:
        grad_weight = grad.T @ hidden[rows]
    return grad_hidden, grad_weight


def _clamped(rows, hidden):
    return rows.clamp(0, hidden.shape[0] - 1) if hidden.shape[0] else rows[:0]
