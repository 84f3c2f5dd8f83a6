"""Shared by all tests: one seed, few threads, no backend request left over from another test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that reads it: tests use no network

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    """Every test begins with the same random state and thread count and leaves the backend choice as it found it."""
    from longvita_kernels import backends

    before, threads = backends.requested(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    backends.use(before or "auto")
