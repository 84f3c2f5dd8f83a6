"""What the ops on the native matrix product (csrc/cpu/gemm) share on the Python side."""

import torch

from longvita_kernels import native


def scratch():
    """Working memory of the matrix product for the current number of threads: about 7.7 MiB each."""
    return torch.empty(torch.get_num_threads() * native.load().gemm_scratch_floats(), dtype=torch.float32)


def dense_rows(tensor):
    """The tensor itself if its last dimension is dense (what the kernels read), else a copy."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
