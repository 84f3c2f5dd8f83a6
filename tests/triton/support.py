"""What the tests of interpreted kernels share: the backend, and a spec's samples held to the accuracy rule."""

import pytest
import torch

from longvita_kernels import backends, testing
from longvita_kernels.spec import all_specs
from longvita_kernels.triton import _launch

assert _launch.INTERPRETED, "set TRITON_INTERPRET=1 before pytest starts"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def on_triton():
    torch.set_num_threads(1)
    with backends.use("triton"):
        yield


def check(name, dtype, seed, choices):
    """Every sample of an op, with each of `choices(sample)` (see testing.check_samples): one draw of each, as a pool would take minutes."""
    spec = all_specs()[name]
    samples = list(spec.samples(dtype, "cpu", seed))
    assert all(backends.choose(name, sample.args[0]) == "triton" for sample in samples)
    testing.check_samples(spec, samples, choices)
