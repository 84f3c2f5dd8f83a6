"""Attention on a GPU at sizes that samples do not have: long and many documents, offsets past 2³¹, long caches."""

import pytest
import torch

from longvita_kernels import append_kv, decode_attention, testing, varlen_attention
from longvita_kernels.ops import _varlen_paths
from longvita_kernels.ops.decode_attention import SPEC as DECODE
from longvita_kernels.ops.varlen_attention import SPEC
from longvita_kernels.spec import SampleInput
from tests.gpu.support import offsets, on, on_either_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


@on(SPEC, "triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window_size": (300, 0)}, {"softcap": 20.0, "window_size": (500, 100), "causal": False}], ids=str
)
def test_packed_documents_of_every_length(spec, backend, options, dim, dtype):
    lengths = (1000, 1, 0, 127, 128, 129, 2048, 63, 700)
    tokens = sum(lengths)
    q, k, v = (_random(tokens, heads, dim, dtype=dtype) for heads in (4, 2, 2))
    sample = SampleInput("packed", (q, k, v, offsets(*lengths)), {"return_lse": True, **options}, ("q", "k", "v"))
    testing.check_sample(SPEC, sample)


def _plain(grad, q, k, v, arguments):
    """(out, lse, dq, dk, dv) by plain products."""
    found = _varlen_paths.blocked_forward(q, k, v, *arguments)
    return *found[:2], *_varlen_paths.blocked_backward(grad, None, q, k, v, *found, *arguments)


@on_either_backward(SPEC, "triton", "cuda")
def test_a_long_document_against_plain_products(spec, backend, either_backward):
    tokens = 16384
    for dtype in (torch.bfloat16,) if backend == "cuda" else (torch.bfloat16, torch.float32):
        q, k, v, grad = (_random(tokens, heads, 128, dtype=dtype) for heads in (5, 1, 1, 5))
        cu = offsets(tokens)
        arguments = (cu, cu, 128**-0.5, -1, 0, 0.0)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = varlen_attention(*leaves, cu, return_lse=True)
        got = (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad))
        want, exact = (_plain(*(x.to(kind) for x in (grad, q, k, v)), arguments) for kind in (dtype, torch.float32))
        for what, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), got, want, exact, strict=True):
            if dtype == torch.float32:
                torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4, msg=lambda text, what=what: f"{what}: {text}")
            else:  # held to the composition's error against float32
                assert (a.float() - c).norm() <= 1.5 * (b.float() - c).norm() + torch.finfo(dtype).eps * c.norm(), what


@on_either_backward(SPEC, "triton", "cuda")
def test_offsets_past_two_to_the_31(spec, backend, either_backward):
    """q alone has 2.3e9 elements; another document changes no bit, so the last ones must be what they are alone."""
    heads, dim, length, documents = 17, 128, 512, 2048
    tokens = length * documents
    q = _random(1, heads, dim).expand(tokens, heads, dim).contiguous()
    assert q.numel() > 2**31
    k, v = (_random(tokens, 1, dim) for _ in "kv")
    tail = slice(tokens - 3 * length, tokens)
    found = []
    for at, cu in ((slice(None), offsets(*[length] * documents)), (tail, offsets(*[length] * 3))):
        leaves = [x[at].detach().requires_grad_() for x in (q, k, v)]
        out, lse = varlen_attention(*leaves, cu, return_lse=True)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        found.append([out.detach()[-3 * length :], lse.detach()[:, -3 * length :], *(grad[-3 * length :] for grad in grads)])
        del out, lse, grads, leaves
    for a, b in zip(*found, strict=True):
        testing.assert_bit_equal(a.contiguous(), b.contiguous())


@on(DECODE, "triton", "torch")
@pytest.mark.parametrize("quantised", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_cache_past_two_to_the_31(spec, backend, quantised):
    """A cache of 2.3e9 elements: what is appended to its last sequence is read back."""
    batch, capacity, heads, dim = 5, 450_000, 8, 128
    shape = (batch, capacity, heads, dim)
    dtype = quantised or torch.bfloat16
    k_cache, v_cache = (torch.zeros(shape, dtype=torch.uint8 if quantised else dtype, device="cuda").view(dtype) for _ in "kv")
    assert k_cache.numel() > 2**31
    scales = {scale: torch.zeros(shape[:3], device="cuda") for scale in ("k_scale", "v_scale")} if quantised else {}
    k, v = _random(2000, heads, dim), _random(2000, heads, dim)
    cu = offsets(0, 0, 0, 0, 2000)
    before = torch.tensor([0, 0, 0, 0, capacity - 2000], dtype=torch.int32, device="cuda")
    append_kv(k, v, k_cache, v_cache, cu, before, **scales)
    q = _random(1, 40, dim)
    got = decode_attention(q, k_cache, v_cache, offsets(0, 0, 0, 0, 1), torch.full_like(before, capacity), window_size=(1999, 0), **scales)
    want = varlen_attention(q, k, v, offsets(1), offsets(2000))
    torch.testing.assert_close(got.float(), want.float(), rtol=3e-2, atol=1e-2)


@on(DECODE, "triton", "torch")
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "paged"])
def test_decoding_equals_attention_of_the_last_row(spec, backend, paged):
    lengths, heads, dim, block = (70_001, 5, 1, 3000), (40, 8), 128, 64
    capacity = -(-max(lengths) // block) * block
    k, v = (_random(sum(lengths), heads[1], dim) for _ in "kv")
    blocks = capacity // block
    shape = (len(lengths) * blocks, block) if paged else (len(lengths), capacity)
    k_cache, v_cache = (torch.zeros(*shape, heads[1], dim, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    order = torch.randperm(len(lengths) * blocks, device="cuda").int().view(len(lengths), blocks)
    options = {"block_table": order if paged else None}
    zero = torch.zeros(len(lengths), dtype=torch.int32, device="cuda")
    append_kv(k, v, k_cache, v_cache, offsets(*lengths), zero, **options)
    q = _random(len(lengths), heads[0], dim)
    ones = offsets(*[1] * len(lengths))
    full = offsets(*lengths).diff()
    got, lse = decode_attention(q, k_cache, v_cache, ones, full, return_lse=True, **options)
    want, want_lse = varlen_attention(q, k, v, ones, offsets(*lengths), return_lse=True)
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)


@on_either_backward(SPEC, "triton", "cuda")
def test_wild_offsets_end_in_numbers_not_in_a_fault(spec, backend, either_backward):
    q, k, v = (_random(500, heads, 128) for heads in (4, 2, 2))
    for wild in ((0, 10**9, -5, 7), (-(10**9), 3, 2, 2**31 - 1), (500, 20, 10, 0)):
        cu = torch.tensor(wild, dtype=torch.int32, device="cuda")
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        varlen_attention(*leaves, cu).sum().backward()
        torch.cuda.synchronize()
