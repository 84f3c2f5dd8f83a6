"""What the demo measures, all of it on held-out material: images, the needle grid, and two controls that show what the grid proves."""

from __future__ import annotations

import os
from collections.abc import Callable

from longvita.data.schema import Sample
from longvita.demo.rows import image_path
from longvita.eval import haystack
from longvita.eval.needle import KINDS, needle_grid, score, share
from longvita.infer.engine import generate_ids

STAGE2 = 2


def parts(demo) -> dict[str, Callable[[], dict]]:
    """Name → measurement, in the order in which they run."""
    last = demo.plan.stages[-1].number
    return {
        "images": lambda: images(demo, last),
        "images_stage2": lambda: images(demo, STAGE2),
        **{f"needle_{kind}": lambda kind=kind: needles(demo, last, kind) for kind in KINDS},
        **{f"removed_{kind}": lambda kind=kind: control(demo, last, kind, needle=False) for kind in KINDS},
        **{f"stage2_{kind}": lambda kind=kind: control(demo, STAGE2, kind, needle=True) for kind in KINDS},
    }


def images(demo, stage: int) -> dict:
    """Accuracy over every held-out digit, each asked about as a JPEG file in a conversation of its own."""
    model, processor = demo.model_of(stage)
    digits = haystack.load_digits()[1]
    paths = [os.fspath(demo.material / image_path("held_out", number)) for number in range(len(digits))]

    def prompt(path: str):
        demo.each_step()
        return processor(Sample([{"role": "user", "content": "<image>\n" + haystack.IMAGE_QUESTION}], images=[path]))

    prompts = (prompt(path) for path in paths)
    answers = [processor.tokenizer.decode(ids) for ids in generate_ids(model, prompts, max_new_tokens=4)]
    right = [score(answer, str(digit)) for answer, digit in zip(answers, digits.labels, strict=True)]
    result = share(sum(right), len(right))
    demo.tell(f"stage {stage}: {result['accuracy']:.3f} of {len(right)} held-out images right")
    return {**result, "answers": answers, "labels": digits.labels.tolist()}


def needles(demo, stage: int, kind: str) -> dict:
    """The grid of lengths × depths."""
    plan = demo.plan
    model, processor = demo.model_of(stage)
    return needle_grid(
        model, processor, kind, lengths=plan.lengths, depths=plan.depths, questions=plan.grid_questions, seed=demo.seed, progress=demo.tell,
        each_question=demo.each_step,
    )  # fmt: skip


def control(demo, stage: int, kind: str, *, needle: bool) -> dict:
    """The full length only: with the needle removed, or asked of an earlier stage's model."""
    plan = demo.plan
    model, processor = demo.model_of(stage)
    note = f"stage {stage}'s model" if needle else "needle removed"
    return needle_grid(
        model, processor, kind, lengths=plan.lengths[-1:], depths=plan.depths, seed=demo.seed + 1, needle=needle,
        questions=plan.stage2_controls if needle else plan.controls,
        progress=lambda line: demo.tell(f"{note}: {line}"), each_question=demo.each_step,
    )  # fmt: skip
