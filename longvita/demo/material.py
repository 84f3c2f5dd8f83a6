"""Writes what the demo trains on: JPEG images, MP4 videos and one JSONL file a stage, as a user's own data would lie on disk.

    material/images/{train,held_out}/0000.jpg …   the handwritten digits
    material/videos/stage2/0000.mp4 …             digits at one frame per second, one of them marked
    material/stage1.jsonl … stage4.jsonl          the rows, with paths relative to material/

Everything in it follows from the plan and its seed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from longvita.config import LongVitaConfig, presets
from longvita.data.media import MediaLimits
from longvita.data.processor import Processor
from longvita.data.template import ChatTokenizer
from longvita.demo.plan import StagePlan
from longvita.demo.rows import RowMaker, image_path
from longvita.eval import haystack
from longvita.eval.haystack import NAMES

SPLITS = ("train", "held_out")
VOCAB_SIZE = 704
FACT_REPEATS = 24  # so that the names are frequent enough to become tokens of their own


def make_tokenizer() -> ChatTokenizer:
    """A small byte-level BPE, learned from the training prose and from codes, questions and answers."""
    codes = [
        template.format(name=name, digit=digit)
        for template in (haystack.TEXT_FACT, haystack.TEXT_QUESTION, haystack.TEXT_ANSWER)
        for name in NAMES
        for digit in range(10)
    ]
    frames = [" " + " ".join([*haystack.WORDS, haystack.MARK_WORD])]
    questions = [haystack.IMAGE_QUESTION, haystack.IMAGES_QUESTION, haystack.VIDEO_QUESTION, haystack.CAPTION_QUESTION]
    return ChatTokenizer.train_bpe([haystack.load_prose()[0], *(codes * FACT_REPEATS), *((frames + questions) * 1000)], VOCAB_SIZE)


def make_config(tokenizer: ChatTokenizer) -> LongVitaConfig:
    """The tiny preset with the tokenizer's vocabulary."""
    tiny = presets["tiny"]
    return dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, vocab_size=len(tokenizer)), tokens=tokenizer.token_ids)


def make_processor(config: LongVitaConfig, tokenizer: ChatTokenizer, material: Path) -> Processor:
    """Reads media below `material` only."""
    return Processor(config, tokenizer, MediaLimits(root=os.fspath(material)))


def write_images(material: Path) -> None:
    """Every digit as a JPEG, once."""
    from PIL import Image

    for split, digits in zip(SPLITS, haystack.load_digits(), strict=True):
        (material / image_path(split, 0)).parent.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(digits.images):
            Image.fromarray(image).save(material / image_path(split, number), quality=92)


def write_stage(material: Path, stage: StagePlan, processor: Processor, seed: int) -> Path:
    """The stage's JSONL and its videos: a little more than the tokens that the stage will read."""
    rng = np.random.default_rng([seed, 10 + stage.number])
    maker = RowMaker(material, stage, processor, rng)
    path = material / f"stage{stage.number}.jsonl"
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        for row in maker.rows():
            file.write(json.dumps(row) + "\n")
    unfinished.replace(path)
    return path
