"""What GPU tests share."""

import itertools

import pytest
import torch


def name(value):
    """How a parameter is called in a test's name."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "name", None)


def offsets(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def on(spec, *backends):
    """Runs a test for an op on these backends: its arguments `spec` and `backend`."""
    return pytest.mark.parametrize(("spec", "backend"), [(spec, backend) for backend in backends], ids=name)


def on_either_backward(spec, *backends):
    """The same where attention in CUDA C++ stands twice, with its backward in two passes and in one; a test names `either_backward` too."""
    ways = [(spec, backend, limit) for backend in backends for limit in ((0, 1 << 60) if backend == "cuda" else (None,))]
    return pytest.mark.parametrize(("spec", "backend", "either_backward"), ways, ids=name, indirect=["either_backward"])
