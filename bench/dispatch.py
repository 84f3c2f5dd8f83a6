"""What a call costs when there is next to nothing to compute: checks, dispatcher, arguments, one thread woken or not."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.harness import OURS, Case, Setup, seconds
from longvita_kernels import (
    append_kv,
    backends,
    decode_attention,
    linear_cross_entropy,
    masked_lm_head,
    merge_attention,
    pixel_shuffle_projection,
    varlen_attention,
)

LIMIT = 15e-6


def _attention():
    q, k, v = (torch.randn(8, heads, 32) for heads in (2, 1, 1))
    cu = torch.tensor([0, 8], dtype=torch.int32)
    q_HLD, k_HLD, v_HLD = (x.transpose(0, 1)[None] for x in (q, k, v))
    return {
        OURS: lambda: varlen_attention(q, k, v, cu),
        "SDPA": lambda: F.scaled_dot_product_attention(q_HLD, k_HLD, v_HLD, is_causal=True, enable_gqa=True),
    }


def _cache():
    k_cache, v_cache = torch.randn(1, 32, 1, 32), torch.randn(1, 32, 1, 32)
    return k_cache, v_cache, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([16], dtype=torch.int32)


def _decode():
    q, (k_cache, v_cache, cu, lengths) = torch.randn(1, 2, 32), _cache()
    return {OURS: lambda: decode_attention(q, k_cache, v_cache, cu, lengths)}


def _append():
    k, v, (k_cache, v_cache, cu, lengths) = torch.randn(1, 1, 32), torch.randn(1, 1, 32), _cache()
    return {OURS: lambda: (append_kv(k, v, k_cache, v_cache, cu, lengths), k_cache, v_cache)[1:]}


def _merge():
    out, lse = torch.randn(8, 2, 32), torch.randn(2, 8)
    return {OURS: lambda: merge_attention(out, lse, out, lse)}


def _head():
    hidden, weight, rows = torch.randn(8, 32), torch.randn(64, 32), torch.tensor([7])
    return {OURS: lambda: masked_lm_head(hidden, weight, rows), "gather + linear": lambda: F.linear(hidden[rows], weight)}


def _loss():
    hidden, weight, labels = torch.randn(8, 32), torch.randn(64, 32), torch.arange(8)
    return {
        OURS: lambda: linear_cross_entropy(hidden, weight, labels),
        "logits + cross entropy": lambda: F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum"),
    }


def _projector():
    x, w1, w2, ones = torch.randn(1, 17, 8), torch.randn(32, 32), torch.randn(32, 32), torch.ones(32)
    return {OURS: lambda: pixel_shuffle_projection(x, ones, ones, w1, w2, grid=(4, 4))}


def _setup(make):
    calls = make()

    def check():
        got = _copied(calls[OURS]())
        with backends.use("reference"):
            ref = _copied(calls[OURS]())
        close = [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, ref, strict=True)]
        return [] if all(close) else ["it differs from the reference"]

    return Setup(calls=calls, check=check)


def _copied(outputs):
    return [x.clone() for x in (outputs if isinstance(outputs, tuple) else (outputs,))]


def cases() -> Iterator[Case]:
    for op, calls in (
        ("varlen_attention", _attention), ("decode_attention", _decode), ("append_kv", _append), ("merge_attention", _merge),
        ("masked_lm_head", _head), ("linear_cross_entropy", _loss), ("pixel_shuffle_projection", _projector),
    ):  # fmt: skip
        yield Case(
            op=op, label="tiny call", dtype=torch.float32, direction="forward", flops=0, bytes=0, ceiling=None, goals=(seconds(LIMIT),),
            build=functools.partial(_setup, calls),
        )  # fmt: skip
