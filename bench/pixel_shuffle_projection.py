"""The projector against the eager and the compiled composition, and against its matrix products alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from bench.harness import OURS, Case, Setup, best_peer, generator, gradients, peak, times_as_long
from longvita_kernels import pixel_shuffle_projection, testing
from longvita_kernels.ops.pixel_shuffle_projection import SPEC
from longvita_kernels.spec import SampleInput

CHANNELS, HIDDEN, OUT = 1024, 1024, 5120  # InternViT-300M, the projector's hidden layer, Qwen2.5-14B


def _bare(x, w1, w2, grad, backward):
    """The products that no implementation avoids: two, or six with backward, on matrices that lie ready."""
    shuffled, grad = x[:, 1:].reshape(-1, 4 * CHANNELS), grad.reshape(-1, OUT)
    hidden = torch.randn(shuffled.shape[0], HIDDEN).to(x.dtype)  # stands for the activation and for the gradient of what it was made from

    def products():
        torch.mm(shuffled, w1.T), torch.mm(hidden, w2.T)
        if backward:
            torch.mm(grad, w2), torch.mm(grad.T, hidden), torch.mm(hidden, w1), torch.mm(hidden.T, shuffled)

    return products


def _build(tiles, dtype, backward):
    random = generator()

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=random) * scale).to(dtype)

    x, w1 = normal(tiles, 1025, CHANNELS), normal(HIDDEN, 4 * CHANNELS, scale=(4 * CHANNELS) ** -0.5)
    w2, ln_weight = normal(OUT, HIDDEN, scale=HIDDEN**-0.5), 1 + normal(4 * CHANNELS, scale=0.1)
    ln_bias, grad = normal(4 * CHANNELS, scale=0.1), normal(tiles, 256, OUT)
    inputs = (x, ln_weight, ln_bias, w1, w2)
    names = ("x", "ln_weight", "ln_bias", "w1", "w2") if backward else ()
    sample = SampleInput("timed", inputs, {}, names)

    def check():
        measure = testing.yardstick(SPEC, sample, moves=0)
        return testing.violations(SPEC, sample, testing.run(SPEC.op, SPEC, sample, cotangents=measure.cotangents), measure)

    functions = {OURS: pixel_shuffle_projection, "eager": SPEC.base, "compiled": torch.compile(SPEC.base)}
    if backward:
        calls = {name: gradients(function, inputs, grad) for name, function in functions.items()}
    else:
        calls = {name: functools.partial(function, *inputs) for name, function in functions.items()}
    calls[f"bare {'six' if backward else 'two'} torch.mm"] = _bare(x, w1, w2, grad, backward)
    return Setup(calls=calls, check=check)


def cases(tiles: int = 12, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> Iterator[Case]:
    tokens = tiles * 256
    forward = 2 * tokens * HIDDEN * (4 * CHANNELS + OUT)
    for dtype in dtypes:
        size = torch.finfo(dtype).bits // 8
        moved = size * (tiles * 1025 * CHANNELS + HIDDEN * (4 * CHANNELS + OUT) + tokens * OUT)
        for direction, factor, count, most in (("forward", 1, "two", 1.00), ("forward + backward", 3, "six", 1.03)):
            bare = f"bare {count} torch.mm"
            goals = (times_as_long(bare, least=1 / most), best_peer(besides=(bare,)))
            if factor == 1:  # no permuted copy of the patches: room for the result and the activation alone
                goals += (peak(size * tokens * (OUT + HIDDEN) + (4 << 20)),)
            yield Case(
                op="pixel_shuffle_projection", label=f"{tiles} tiles, {4 * CHANNELS:,} → {HIDDEN:,} → {OUT:,}", dtype=dtype,
                direction=direction, flops=factor * forward, bytes=moved * (1 if factor == 1 else 3), ceiling="mm",
                goals=goals if dtype == torch.bfloat16 else (), build=functools.partial(_build, tiles, dtype, direction != "forward"),
            )  # fmt: skip


def cuda_cases() -> Iterator[Case]:
    yield from cases(256, (torch.bfloat16,))
