"""The loss of the vocabulary head against materialised logits and torch's own linear_cross_entropy, plain and chunked."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.harness import OURS, Case, Setup, best_peer, generator, gradients, peak, share, times_as_long
from longvita_kernels import linear_cross_entropy, testing
from longvita_kernels.ops.linear_cross_entropy import SPEC
from longvita_kernels.spec import SampleInput

LOW_MEMORY = f"{OURS}, low memory"


def _problems(hidden, weight, labels):
    """The rule on the supervised rows (the others must get a gradient of zero), with the definition's logits made for those alone."""
    rows, found = labels != -100, []
    sample = SampleInput("timed", (hidden[rows], weight, labels[rows]), {}, ("hidden", "weight"))
    ref = testing.run(SPEC.reference, SPEC, sample, double=True, cotangents=[torch.ones(())])
    base = testing.run(SPEC.base, SPEC, sample, cotangents=[torch.ones(())])
    for low_memory in (False, True):
        leaves = tuple(x.detach().requires_grad_() for x in (hidden, weight))
        loss = linear_cross_entropy(*leaves, labels, low_memory=low_memory)
        grads = torch.autograd.grad(loss, leaves)
        if bool((grads[0][~rows] != 0).any()):
            found.append("a row without a label has a gradient")
        got = testing.Run({"loss": loss.detach()}, {"hidden": grads[0][rows], "weight": grads[1]})
        found += testing.violations(SPEC, sample, got, testing.Yardstick(ref, base, []))
    return found


def _logits(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def _build(rows, width, vocab, supervised, dtype):
    random = generator()
    hidden = torch.randn(rows, width, generator=random).to(dtype)
    weight = (torch.randn(vocab, width, generator=random) / width**0.5).to(dtype)
    every_label = torch.randint(vocab, (rows,), generator=random)
    labels = every_label.clone()
    labels[torch.randperm(rows, generator=random)[supervised:]] = -100
    one = torch.ones(())
    functions = {OURS: lambda h, w: linear_cross_entropy(h, w, labels)}
    functions[LOW_MEMORY] = lambda h, w: linear_cross_entropy(h, w, labels, low_memory=True)
    if supervised < rows:
        functions[f"{OURS}, all supervised"] = lambda h, w: linear_cross_entropy(h, w, every_label)
    functions["logits + cross entropy"] = lambda h, w: _logits(h, w, labels)
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        functions["torch linear_cross_entropy"] = lambda h, w: F.linear_cross_entropy(h, w, labels, reduction="sum").float()
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and supervised == rows:
        chunked = torch.nn.LinearCrossEntropyOptions()
        functions["torch's, chunked"] = lambda h, w: F.linear_cross_entropy(h, w, labels, reduction="sum", options=chunked).float()
    calls = {name: gradients(function, (hidden, weight), one) for name, function in functions.items()}
    return Setup(calls=calls, check=lambda: _problems(hidden, weight, labels))


def _goals(rows, width, vocab, supervised, dtype):
    if dtype != torch.bfloat16:
        return (best_peer(),)
    if rows > 1024:  # beside the op with every row supervised
        return (times_as_long(f"{OURS}, all supervised", least=1 / 0.12),) if supervised < rows else ()
    results = 2 * (rows + vocab) * width
    return (
        share(0.85), best_peer(), times_as_long("torch's, chunked", least=10), peak(4 * vocab * width + (32 << 20)),
        share(0.85, LOW_MEMORY, work=4 / 3), peak(results + (64 << 20), LOW_MEMORY),
    )  # fmt: skip


def _case(rows, width, vocab, supervised, dtype):
    size = torch.finfo(dtype).bits // 8
    label = f"{rows:,} rows × {width:,} × {vocab:,}, " + ("all supervised" if supervised == rows else "10 % supervised")
    return Case(
        op="linear_cross_entropy", label=label, dtype=dtype, direction="forward + backward",
        flops=3 * 2 * supervised * width * vocab, bytes=size * (2 * rows * width + 2 * vocab * width), ceiling="mm",
        heavy=supervised < rows, goals=_goals(rows, width, vocab, supervised, dtype),
        build=functools.partial(_build, rows, width, vocab, supervised, dtype),
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for rows, supervised in ((1024, 1024), (16384, 1638)):
            yield _case(rows, 1024, 32768, supervised, dtype)


def cuda_cases() -> Iterator[Case]:
    """Qwen2.5-14B's head."""
    for supervised in (4096, 410):
        yield _case(4096, 5120, 152064, supervised, torch.bfloat16)
