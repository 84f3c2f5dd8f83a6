"""Matrix products with float32 results, inside torch: what the ways inside torch (backend "torch") are made of.

Operands of 16 bits are multiplied as such on a GPU, by one call of cuBLAS that does not round the sums. torch has that call for CUDA
only; elsewhere the operands are widened first.
"""

import torch

from longvita_kernels.ops import _common


def product(a, b):
    """a @ b in float32 (float64 for float64), of matrices or batches of them."""
    if a.is_cuda and a.element_size() == 2:
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    wide = _common.compute_dtype(a)
    return a.to(wide) @ b.to(wide)


def add_product(total, a, b):
    """total += a @ b, where total is float32."""
    if a.is_cuda and a.element_size() == 2:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
