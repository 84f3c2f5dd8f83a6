"""The head of one decoding step: a few rows of a long hidden state against a large vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.harness import OURS, Case, Setup, best_peer, generator, share
from longvita_kernels import masked_lm_head, testing
from longvita_kernels.ops.masked_lm_head import SPEC
from longvita_kernels.spec import SampleInput


def _build(tokens, width, vocab, count, dtype):
    random = generator()
    hidden = torch.randn(tokens, width, generator=random).to(dtype)
    weight = (torch.randn(vocab, width, generator=random) / width**0.5).to(dtype)
    rows = torch.randperm(tokens, generator=random)[:count]
    sample = SampleInput("timed", (hidden, weight, rows), {}, ())

    def check():
        return testing.violations(SPEC, sample, testing.run(SPEC.op, SPEC, sample, wrt=()), testing.yardstick(SPEC, sample, moves=0))

    calls = {OURS: lambda: masked_lm_head(hidden, weight, rows), "gather + linear": lambda: F.linear(hidden[rows], weight)}
    return Setup(calls=calls, check=check)


def cases() -> Iterator[Case]:
    tokens, width, vocab = 65536, 1024, 152064
    for dtype in (torch.bfloat16, torch.float32):
        size = torch.finfo(dtype).bits // 8
        for count, ceiling, goals in ((1, "read", (share(0.85),)), (4, "read", ()), (64, "mm", ())):
            yield Case(
                op="masked_lm_head", label=f"{count} of {tokens:,} rows × {width:,}, vocabulary {vocab:,}", dtype=dtype,
                direction="forward", flops=2 * count * width * vocab, bytes=size * (width * vocab + count * (width + vocab)),
                ceiling=ceiling, goals=(*goals, best_peer()), build=functools.partial(_build, tokens, width, vocab, count, dtype),
            )  # fmt: skip
