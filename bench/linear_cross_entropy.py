"""The loss of the vocabulary head against materialised logits and torch's own linear_cross_entropy, plain and chunked."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.harness import OURS, Case, Setup, generator, gradients
from longvita_kernels import linear_cross_entropy, testing
from longvita_kernels.ops.linear_cross_entropy import SPEC
from longvita_kernels.spec import SampleInput


def _problems(hidden, weight, labels):
    """The rule on the supervised rows (the others must get a gradient of zero), with the definition's logits made for those alone."""
    leaves = tuple(x.detach().requires_grad_() for x in (hidden, weight))
    loss = linear_cross_entropy(*leaves, labels)
    grads = torch.autograd.grad(loss, leaves)
    rows = labels != -100
    if bool((grads[0][~rows] != 0).any()):
        return ["a row without a label has a gradient"]
    sample = SampleInput("timed", (hidden[rows], weight, labels[rows]), {}, ("hidden", "weight"))
    ref = testing.run(SPEC.reference, SPEC, sample, double=True, cotangents=[torch.ones(())])
    base = testing.run(SPEC.base, SPEC, sample, cotangents=[torch.ones(())])
    got = testing.Run({"loss": loss.detach()}, {"hidden": grads[0][rows], "weight": grads[1]})
    return testing.violations(SPEC, sample, got, testing.Yardstick(ref, base, []))


def _logits(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def _build(rows, width, vocab, supervised, dtype):
    random = generator()
    hidden = torch.randn(rows, width, generator=random).to(dtype)
    weight = (torch.randn(vocab, width, generator=random) / width**0.5).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=random)
    labels[torch.randperm(rows, generator=random)[supervised:]] = -100
    one = torch.ones(())
    functions = {OURS: lambda h, w: linear_cross_entropy(h, w, labels)}
    functions[f"{OURS}, low memory"] = lambda h, w: linear_cross_entropy(h, w, labels, low_memory=True)
    functions["logits + cross entropy"] = lambda h, w: _logits(h, w, labels)
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        functions["torch linear_cross_entropy"] = lambda h, w: F.linear_cross_entropy(h, w, labels, reduction="sum").float()
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and supervised == rows:
        chunked = torch.nn.LinearCrossEntropyOptions()
        functions["torch's, chunked"] = lambda h, w: F.linear_cross_entropy(h, w, labels, reduction="sum", options=chunked).float()
    calls = {name: gradients(function, (hidden, weight), one) for name, function in functions.items()}
    return Setup(calls=calls, check=lambda: _problems(hidden, weight, labels))


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        size = torch.finfo(dtype).bits // 8
        for rows, supervised, goal in ((1024, 1024, 0.85), (16384, 16384, None), (16384, 1638, None)):
            width, vocab = 1024, 32768
            label = f"{rows:,} rows × {width:,} × {vocab:,}, " + ("all supervised" if supervised == rows else "10 % supervised")
            yield Case(
                op="linear_cross_entropy", label=label, dtype=dtype, direction="forward + backward",
                flops=3 * 2 * supervised * width * vocab, bytes=size * (2 * rows * width + 2 * vocab * width), ceiling="mm",
                heavy=supervised > 2048, goal=goal if dtype == torch.bfloat16 else None,
                build=functools.partial(_build, rows, width, vocab, supervised, dtype),
            )  # fmt: skip
