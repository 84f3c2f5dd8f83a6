"""Loops over threads: every step once, whatever the number of threads and however many of them the OpenMP runtime really gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longvita_kernels import append_kv, merge_attention

# Two threads at most, but the loop asks for twelve and cuts its steps into twelve shares, of which a thread helps with eight at most.
_SMALLER_TEAM = """
import torch
from longvita_kernels import merge_attention
torch.manual_seed(0)
inputs = torch.randn(1000, 3, 40), torch.randn(3, 1000), torch.randn(1000, 3, 40), torch.randn(3, 1000)
torch.set_num_threads(1)
expected = merge_attention(*inputs)
torch.set_num_threads(12)
for got, one in zip(merge_attention(*inputs), expected, strict=True):
    assert torch.equal(got, one)
"""


@pytest.mark.parametrize("tokens", [43, 500, 1025])
@pytest.mark.parametrize("threads", [2, 3, 8, 13])
def test_every_row_is_merged_by_any_number_of_threads(tokens, threads):
    inputs = torch.randn(tokens, 10, 64), torch.randn(10, tokens), torch.randn(tokens, 10, 64), torch.randn(10, tokens)
    torch.set_num_threads(1)
    expected = merge_attention(*inputs)
    torch.set_num_threads(threads)
    for got, one in zip(merge_attention(*inputs), expected, strict=True):
        assert torch.equal(got, one)


def test_every_token_is_appended():
    k, v = torch.randn(2, 1000, 2, 32).unbind()
    k_cache, v_cache = torch.full((2, 1, 1010, 2, 32), torch.nan).unbind()
    torch.set_num_threads(7)
    append_kv(k, v, k_cache, v_cache, torch.tensor([0, 1000], dtype=torch.int32), torch.tensor([10], dtype=torch.int32))
    assert torch.equal(k_cache[0, 10:], k) and torch.equal(v_cache[0, 10:], v)
    assert k_cache[0, :10].isnan().all() and v_cache[0, :10].isnan().all()


def test_a_team_that_is_smaller_than_asked_for_does_all_the_work():
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    command, root = [sys.executable, "-c", _SMALLER_TEAM], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
