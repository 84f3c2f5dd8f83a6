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
    """Every sample of an op, with each of `choices(sample)` (see testing.check_samples). It runs on the first draw; all take minutes."""
    spec = all_specs()[name]
    pools = testing.pools(spec, dtype, "cpu", seed)
    assert all(backends.choose(name, draws[0].args[0]) == "triton" for draws in pools)
    testing.check_samples(spec, pools, choices, runs=1)
