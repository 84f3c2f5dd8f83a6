"""Combination of two partial attentions in CUDA C++ (equations: ops/merge_attention.py; kernels: csrc/cuda/merge_attention.cu)."""

from longvita_kernels import native
from longvita_kernels.cuda import native_cuda
from longvita_kernels.ops import _common


def forward(out_a, lse_a, out_b, lse_b, out, lse):
    """Write out (T, H, D) and lse (H, T), both dense."""
    native_cuda.call("merge_attention_forward", out.device, *_inputs(out_a, lse_a, out_b, lse_b), out.data_ptr(), lse.data_ptr())


def backward(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, grads):
    """Write the gradients of the four inputs, each dense, or None where not needed; grad_out, grad_lse: None if unused."""
    native_cuda.call(
        "merge_attention_backward", out_a.device, *_inputs(out_a, lse_a, out_b, lse_b), *_common.pointer_and_strides(grad_out, 2),
        *_common.pointer_and_strides(grad_lse, 2), [0 if grad is None else grad.data_ptr() for grad in grads],
    )  # fmt: skip


def _inputs(out_a, lse_a, out_b, lse_b):
    tensors = [part for x in (out_a, lse_a, out_b, lse_b) for part in _common.pointer_and_strides(x, 2)]
    return native.dtype_code(out_a.dtype), tuple(out_a.shape), *tensors
