"""Triton kernels for GPUs, one module per op: kernels and their launch only. Nothing here is imported before an op runs on Triton."""
