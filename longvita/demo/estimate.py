"""Estimates how long the demo takes on this machine: times a few steps of each kind and multiplies by the plan's counts.

    units = measure(demo)                    # some seconds
    seconds(demo.plan, units)                # {"material": …, "pretraining": …, "training": …, "evaluation": …}

Four kinds of work make up nearly all of the time, each measured on the real model: a pre-training step on short texts, a pre-training step
of the vision tower, a training step on one text of full length, and reading such a text to answer a question. What else belongs to a step
or a question (video decoding, the projector, the few tokens of an answer) is proportional to them; the factors come from whole runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from longvita.data.processor import collate
from longvita.demo import pretrain
from longvita.demo.plan import Plan
from longvita.eval import haystack
from longvita.infer.engine import generate_ids
from longvita.model.long_vita import LongVita

PARTS = ("material", "pretraining", "training", "evaluation")
SHORT_TOKENS = 4096  # about as many as a pre-training step on texts has
# Whole runs against what the units alone would give, with two threads on an idle machine.
MATERIAL = 0.13  # videos are written faster than they are learned from
TRAINING = 1.25  # the vision tower and the decoding of videos
ROUNDS = 1.3  # a margin: every run kept so far needed one round of pre-training on texts, and up to six are allowed
EVALUATION = 1.5  # videos are decoded, questions and answers made


def _silent(line: str) -> None:
    """What the probes would say."""


def measure(demo) -> dict[str, float]:
    """Seconds of a step ("short", "vision", "long") and of a question at full length ("read"), with as many threads as cores are free."""
    model = LongVita(demo.config)
    rng = np.random.default_rng(demo.seed)
    pretrain.recall_init(model, demo.processor, demo.seed)
    lessons = pretrain.Lessons(demo.processor, demo.plan.context_tokens, rng)
    hay = haystack.TextHay(haystack.load_prose()[0], demo.tokenizer)
    text = haystack.text_needle(hay, demo.processor, demo.plan.context_tokens, rng, facts=4, ask=4).sample
    whole = collate([demo.processor.encode(text)], reset=True)
    prompt = demo.processor(text.messages[:1])

    def steps(run: Callable[[Callable[[], None]], None]) -> float:
        starts: list[float] = []

        def each_step() -> None:
            demo.each_step()
            starts.append(time.perf_counter())

        run(each_step)
        starts.append(time.perf_counter())
        return float(np.diff(starts)[1:].mean())  # the first is slower: it allocates

    def train(batch_at, count: int) -> float:
        loss_at = pretrain.mean_loss(model, batch_at, count)
        return steps(lambda each: pretrain.fit(model, "text", [], count, loss_at, "probe", _silent, each))

    with torch.random.fork_rng(devices=[]):
        units = {
            "short": train(lessons.texts, 6),
            "vision": steps(lambda each: pretrain.pretrain_vision(model, haystack.load_digits()[0], 6, demo.seed, _silent, each)),
            "long": train(lambda done: whole, 3),
        }

        def read(each) -> None:
            for _ in range(3):
                each()
                generate_ids(model, prompt, max_new_tokens=8, stop_tokens=())

        return {**units, "read": steps(read)}


def seconds(plan: Plan, units: dict[str, float]) -> dict[str, float]:
    """Expected seconds of each part of the demo."""
    full = plan.context_tokens
    token, written = units["short"] / SHORT_TOKENS, 0.0
    training = 0.0
    for stage in plan.stages:
        recipe = stage.recipe
        tokens = recipe.steps * recipe.global_batch * recipe.sequence_length
        # Attention grows with the context: its share of a full-length step is what exceeds the cost of the step's tokens.
        beyond = max(0.0, units["long"] - token * full) / full * (recipe.sequence_length / full)
        training += tokens * (token + beyond)
        written += tokens * token
    questions = sum(count * _read(units, length, full) for length, count in zip(plan.lengths, plan.grid_questions, strict=True))
    controls = (plan.controls + plan.stage2_controls) * units["read"]
    return {
        "material": MATERIAL * written,
        "pretraining": units["vision"] * plan.pretrain.vision_steps
        + units["short"] * (ROUNDS * plan.pretrain.text_steps + plan.pretrain.list_steps / 4),
        "training": TRAINING * training,
        "evaluation": EVALUATION * 2 * len(plan.depths) * (questions + controls),
    }


def _read(units: dict[str, float], length: int, full: int) -> float:
    """Seconds of a question at `length` tokens: half of those at full length are attention's."""
    return units["read"] * (length / full) * (0.5 + 0.5 * length / full)
