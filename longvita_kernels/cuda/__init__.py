"""CUDA C++ kernels for GPUs (csrc/cuda/), one module per op: their launch only. Nothing here is imported before an op asks for them."""
