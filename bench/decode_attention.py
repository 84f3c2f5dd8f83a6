"""One query against a long cache: how close to reading the cache once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.harness import OURS, Case, Setup, best_peer, generator, share, times_as_long
from longvita_kernels import decode_attention, memory, testing
from longvita_kernels.ops.decode_attention import SPEC
from longvita_kernels.spec import SampleInput


def _quantised(cache):
    """int8 codes and their scales (B, S, Hkv), as append_kv makes them."""
    scale = cache.float().abs().amax(-1) / 127
    return _cache((cache.float() / scale.unsqueeze(-1)).round().to(torch.int8)), _cache(scale)


def _cache(values):
    """In memory such as a model's cache has."""
    return memory.empty(values.shape, dtype=values.dtype, device=values.device).copy_(values)


def _build(cached, heads, dim, dtype, sequences=1):
    random = generator()
    query_heads, kv_heads = heads
    q = torch.randn(sequences, query_heads, dim, generator=random).to(dtype)
    k, v = (_cache(torch.randn(sequences, cached, kv_heads, dim, generator=random).to(dtype)) for _ in range(2))
    cu_seqlens_q, lengths = torch.arange(sequences + 1, dtype=torch.int32), torch.full((sequences,), cached, dtype=torch.int32)
    (k8, k_scale), (v8, v_scale) = _quantised(k), _quantised(v)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    k_HSD, v_HSD = k.transpose(1, 2), v.transpose(1, 2)

    def check():
        lines = []
        for label, args, kwargs in (("", (q, k, v), {}), ("int8", (q, k8, v8), scales)):
            sample = SampleInput(label, (*args, cu_seqlens_q, lengths), {**kwargs, "return_lse": True}, ())
            got = testing.run(SPEC.op, SPEC, sample, wrt=())
            lines += testing.violations(SPEC, sample, got, testing.yardstick(SPEC, sample, moves=0))
        return lines

    calls = {
        OURS: lambda: decode_attention(q, k, v, cu_seqlens_q, lengths),
        f"{OURS}, int8 cache": lambda: decode_attention(q, k8, v8, cu_seqlens_q, lengths, **scales),
        "SDPA": lambda: F.scaled_dot_product_attention(q[:, :, None], k_HSD, v_HSD, enable_gqa=True),
    }
    return Setup(calls=calls, check=check)


def _case(cached, heads, dtype, goals=(), sequences=1):
    tokens = sequences * cached
    who = "1 query" if sequences == 1 else f"{sequences} sequences of 1 query"
    return Case(
        op="decode_attention", label=f"{who}, {cached:,} cached tokens, {heads[0]}/{heads[1]} × 128", dtype=dtype,
        direction="forward", flops=4 * tokens * heads[0] * 128, bytes=torch.finfo(dtype).bits // 8 * 2 * tokens * heads[1] * 128,
        ceiling="read", goals=(*goals, best_peer()), build=functools.partial(_build, cached, heads, 128, dtype, sequences),
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        goals = (share(0.85), times_as_long(f"{OURS}, int8 cache", most=1 / 1.7)) if dtype == torch.bfloat16 else ()
        for cached, heads in ((131072, (40, 8)), (8192, (40, 8)), (8192, (8, 8))):
            yield _case(cached, heads, dtype, goals if cached == 131072 else ())


def cuda_cases() -> Iterator[Case]:
    for cached, sequences in ((1 << 20, 1), (131072, 1), (8192, 1), (8192, 64)):
        yield _case(cached, (40, 8), torch.bfloat16, sequences=sequences)
