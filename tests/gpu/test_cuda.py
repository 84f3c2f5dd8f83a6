"""What CUDA C++ has beside the ops' samples: the sizes it is made for, tensors past 2³¹ elements, several processes on one GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longvita_kernels import backends, masked_lm_head, merge_attention, testing
from longvita_kernels.cuda import native_cuda

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _on_cuda():
    if native_cuda.load() is None:
        pytest.skip(native_cuda.why_missing())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with backends.use("cuda"):
        yield
    torch.set_float32_matmul_precision(before)


def test_it_is_explained():
    assert backends.explain("merge_attention", torch.ones(1, device="cuda")).startswith("merge_attention: cuda (requested; ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 1037, 5120, 8192])
def test_logits_of_one_to_eight_rows_of_a_real_head(width, dtype):
    hidden, weight = (torch.randn(n, width, device="cuda").to(dtype) for n in (100, 30_011))
    rows = torch.tensor([3, 0, 99, 3, 7, 5, 1, 9], device="cuda")
    exact = hidden[rows].double() @ weight.double().T
    one_by_one = torch.cat([masked_lm_head(hidden, weight, rows[i : i + 1]) for i in range(8)])
    for count in range(1, 9):
        got = masked_lm_head(hidden, weight, rows[:count])
        testing.assert_accurate(out=got, ref=exact[:count], base=torch.nn.functional.linear(hidden[rows[:count]], weight))
        testing.assert_bit_equal(got, one_by_one[:count])


def test_a_weight_past_two_to_the_31():
    weight = torch.empty(420_001, 5120, dtype=torch.bfloat16, device="cuda").normal_()
    assert weight.numel() > 2**31
    hidden, row = torch.randn(2, 5120, device="cuda").bfloat16(), torch.tensor([1], device="cuda")
    got = masked_lm_head(hidden, weight, row)[:, -1000:]
    testing.assert_bit_equal(got.contiguous(), masked_lm_head(hidden, weight[-1000:], row))


def test_rows_out_of_range_are_clamped():
    hidden, weight = (torch.randn(n, 256, device="cuda") for n in (5, 300))
    wild = masked_lm_head(hidden, weight, torch.tensor([-(2**40), 2**40], device="cuda"))
    testing.assert_bit_equal(wild, masked_lm_head(hidden, weight, torch.tensor([0, 4], device="cuda")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_many_rows(dtype):
    tokens, heads, dim = 4099, 40, 128
    outs = [torch.randn(tokens, heads, dim, device="cuda").to(dtype).requires_grad_() for _ in "ab"]
    lses = [(3 * torch.randn(heads, tokens, device="cuda")).requires_grad_() for _ in "ab"]
    found = {}
    for backend in ("cuda", "reference"):
        with backends.use(backend):
            out, lse = merge_attention(outs[0], lses[0], outs[1], lses[1])
            grads = torch.autograd.grad((out, lse), [*outs, *lses], (torch.ones_like(out), torch.ones_like(lse)))
            found[backend] = (out, lse, *grads)
    for got, want in zip(found["cuda"], found["reference"], strict=True):
        tolerance = 1e-5 if dtype == torch.float32 or got.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, want, rtol=tolerance, atol=10 * tolerance)


def test_merging_past_two_to_the_31():
    tokens, heads, dim = 420_000, 40, 128
    out = torch.randn(1, heads, dim, device="cuda").bfloat16().expand(tokens, heads, dim).contiguous()
    lse = torch.zeros(heads, tokens, device="cuda")
    assert out.numel() > 2**31
    merged, total = merge_attention(out, lse, out, lse)
    testing.assert_bit_equal(merged[-5:], out[-5:])
    torch.testing.assert_close(total[:, -5:], torch.full((heads, 5), 2.0, device="cuda").log())


@pytest.mark.dist
@pytest.mark.parametrize("count", [2, 3])
def test_the_ring_over_peer_copies(count, tmp_path):
    """So many processes, on one GPU where there are no more."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.peers", str(tmp_path), str(count), "cuda"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
