"""What CUDA C++ has beside the ops' samples: the sizes it is made for, tensors past 2³¹ elements, several processes on one GPU."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from longvita_kernels import backends, masked_lm_head, merge_attention, testing, varlen_attention
from longvita_kernels.cuda import native_cuda
from longvita_kernels.ops.masked_lm_head import SPEC as HEAD
from longvita_kernels.ops.merge_attention import SPEC as MERGE
from longvita_kernels.ops.varlen_attention import SPEC
from longvita_kernels.spec import SampleInput
from tests.gpu.support import offsets, on, on_either_backward

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@on(MERGE, "cuda")
def test_it_is_explained(spec, backend):
    assert backends.explain("merge_attention", torch.ones(1, device="cuda")).startswith("merge_attention: cuda (requested; ")


@on(HEAD, "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 1037, 5120, 8192])
def test_logits_of_one_to_eight_rows_of_a_real_head(spec, backend, width, dtype):
    hidden, weight = (torch.randn(n, width, device="cuda").to(dtype) for n in (100, 30_011))
    rows = torch.tensor([3, 0, 99, 3, 7, 5, 1, 9], device="cuda")
    exact = hidden[rows].double() @ weight.double().T
    one_by_one = torch.cat([masked_lm_head(hidden, weight, rows[i : i + 1]) for i in range(8)])
    for count in range(1, 9):
        got = masked_lm_head(hidden, weight, rows[:count])
        testing.assert_accurate(out=got, ref=exact[:count], base=torch.nn.functional.linear(hidden[rows[:count]], weight))
        testing.assert_bit_equal(got, one_by_one[:count])


@on(HEAD, "cuda")
def test_a_weight_past_two_to_the_31(spec, backend):
    weight = torch.empty(420_001, 5120, dtype=torch.bfloat16, device="cuda").normal_()
    assert weight.numel() > 2**31
    hidden, row = torch.randn(2, 5120, device="cuda").bfloat16(), torch.tensor([1], device="cuda")
    got = masked_lm_head(hidden, weight, row)[:, -1000:]
    testing.assert_bit_equal(got.contiguous(), masked_lm_head(hidden, weight[-1000:], row))


@on(HEAD, "cuda")
def test_rows_out_of_range_are_clamped(spec, backend):
    hidden, weight = (torch.randn(n, 256, device="cuda") for n in (5, 300))
    wild = masked_lm_head(hidden, weight, torch.tensor([-(2**40), 2**40], device="cuda"))
    testing.assert_bit_equal(wild, masked_lm_head(hidden, weight, torch.tensor([0, 4], device="cuda")))


@on(MERGE, "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_many_rows(spec, backend, dtype):
    tokens, heads, dim = 4099, 40, 128
    outs = [torch.randn(tokens, heads, dim, device="cuda").to(dtype).requires_grad_() for _ in "ab"]
    lses = [(3 * torch.randn(heads, tokens, device="cuda")).requires_grad_() for _ in "ab"]
    found = {}
    for way in ("cuda", "reference"):
        with backends.use(way):
            out, lse = merge_attention(outs[0], lses[0], outs[1], lses[1])
            grads = torch.autograd.grad((out, lse), [*outs, *lses], (torch.ones_like(out), torch.ones_like(lse)))
            found[way] = (out, lse, *grads)
    for got, want in zip(found["cuda"], found["reference"], strict=True):
        tolerance = 1e-5 if dtype == torch.float32 or got.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, want, rtol=tolerance, atol=10 * tolerance)


@on(MERGE, "cuda")
def test_merging_past_two_to_the_31(spec, backend):
    tokens, heads, dim = 420_000, 40, 128
    out = torch.randn(1, heads, dim, device="cuda").bfloat16().expand(tokens, heads, dim).contiguous()
    lse = torch.zeros(heads, tokens, device="cuda")
    assert out.numel() > 2**31
    merged, total = merge_attention(out, lse, out, lse)
    testing.assert_bit_equal(merged[-5:], out[-5:])
    torch.testing.assert_close(total[:, -5:], torch.full((heads, 5), 2.0, device="cuda").log())


# ---------------------------------------------------------------------------------------------------------------------- varlen_attention

LENGTHS = (1000, 1, 0, 127, 128, 129, 2048, 63, 700)
OPTIONS = [{}, {"causal": False}, {"window_size": (300, 0)}, {"causal": False, "window_size": (500, 100), "softmax_scale": 0.1}]


def _attention(lengths, heads=(4, 2), dim=128, dtype=torch.bfloat16, **options):
    q, k, v = (torch.randn(sum(lengths), n, dim, device="cuda").to(dtype) for n in (*heads, heads[1]))
    return SampleInput(f"{dim} {dtype} {options}", (q, k, v, offsets(*lengths)), {"return_lse": True, **options}, ("q", "k", "v"))


@on_either_backward(SPEC, "cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1)], ids=str)
def test_packed_documents_of_every_length(spec, backend, either_backward, options, dim, dtype, heads):
    sample = _attention(LENGTHS, heads, dim, dtype, **options)
    assert backends.explain("varlen_attention", *sample.args, **sample.kwargs).startswith("varlen_attention: cuda")
    for choice in ({}, {"wrt": ("q",)}, {"wrt": ("k", "v")}, {"wrt": ("v",)}, {"used": ("lse",)}):
        testing.check_sample(SPEC, sample, **choice)


@on_either_backward(SPEC, "cuda")
def test_attention_runs_agree_in_every_bit_and_another_document_changes_none(spec, backend, either_backward):
    sample = _attention(LENGTHS)
    first = testing.run(SPEC.op, SPEC, sample)
    for _ in range(49):
        again = testing.run(SPEC.op, SPEC, sample)
        for name, out in (first.outputs | first.grads).items():
            testing.assert_bit_equal((again.outputs | again.grads)[name], out, name=name)
    q, k, v, _ = sample.args
    alone = [x[1000:].contiguous() for x in (q, k, v)]
    out, lse = varlen_attention(*alone, offsets(*LENGTHS[1:]), return_lse=True)
    testing.assert_bit_equal(out, first.outputs["out"][1000:].contiguous())
    testing.assert_bit_equal(lse, first.outputs["lse"][:, 1000:].contiguous())


@on(SPEC, "cuda")
def test_attention_runs_in_a_thread_that_did_nothing_on_the_gpu_before(spec, backend):
    """Such threads, autograd's among them, have no context for the driver's functions until somebody gives them one."""
    sample, found = _attention((300, 129)), []
    expected = varlen_attention(*sample.args)  # and memory that lies ready, so that not even an allocation helps
    thread = threading.Thread(target=lambda: found.append(varlen_attention(*sample.args)))
    thread.start()
    thread.join()
    testing.assert_bit_equal(found[0], expected)


@on_either_backward(SPEC, "cuda")
def test_attention_can_be_captured_and_never_synchronises(spec, backend, either_backward):
    sample = _attention((300, 0, 129))
    q, k, v, cu = sample.args
    leaves, stream, graph = [x.detach().requires_grad_() for x in (q, k, v)], torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def call():
        out = varlen_attention(*leaves, cu)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    with torch.cuda.stream(stream):
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        testing.assert_bit_equal(got, want)


# -------------------------------------------------------------------------------------------------------------------------- peer copies


@pytest.mark.dist
@pytest.mark.parametrize("count", [2, 3])
def test_the_ring_over_peer_copies(count, tmp_path):
    """So many processes, on one GPU where there are no more."""
    if native_cuda.load() is None:
        pytest.skip(native_cuda.why_missing())
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.peers", str(tmp_path), str(count), "cuda"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
