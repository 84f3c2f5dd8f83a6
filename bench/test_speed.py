"""The same shapes for pytest-benchmark: pytest bench --benchmark-only -k "varlen_attention and packed"."""

import importlib

import pytest

from bench.__main__ import MODULES
from bench.harness import OURS

CASES = [case for name in MODULES for case in importlib.import_module(f"bench.{name}").cases() if not case.heavy]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_speed(benchmark, case):
    setup = case.build()
    assert not setup.check()
    benchmark.extra_info |= {"flops": case.flops, "bytes": case.bytes}
    benchmark(setup.calls[OURS])
