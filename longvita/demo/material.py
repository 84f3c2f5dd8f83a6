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
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longvita.config import LongVitaConfig, presets
from longvita.data.media import MediaLimits
from longvita.data.processor import Processor
from longvita.data.template import ChatTokenizer
from longvita.demo.plan import StagePlan
from longvita.eval import haystack
from longvita.eval.haystack import NAMES, Digits, TextHay, VideoHay

SPLITS = ("train", "held_out")
VOCAB_SIZE = 704
LONGEST_CAPTION = 12  # frames
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
        folder = material / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(digits.images):
            Image.fromarray(image).save(folder / f"{number:04d}.jpg", quality=92)


def image_path(split: str, number: int) -> str:
    return f"images/{split}/{number:04d}.jpg"


def write_stage(material: Path, stage: StagePlan, processor: Processor, seed: int) -> Path:
    """The stage's JSONL and its videos: a little more than the tokens that the stage will read."""
    rng = np.random.default_rng([seed, 10 + stage.number])
    maker = _RowMaker(material, stage, processor, rng)
    path = material / f"stage{stage.number}.jsonl"
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        for row in maker.rows():
            file.write(json.dumps(row) + "\n")
    unfinished.replace(path)
    return path


class _RowMaker:
    def __init__(self, material: Path, stage: StagePlan, processor: Processor, rng: np.random.Generator):
        self.material, self.stage, self.processor, self.rng = material, stage, processor, rng
        self.digits: Digits = haystack.load_digits()[0]
        self.videos = VideoHay(self.digits)
        self.texts = TextHay(haystack.load_prose()[0], processor.tokenizer)
        self.folder = material / "videos" / f"stage{stage.number}"

    def rows(self) -> Iterator[dict]:
        recipe = self.stage.recipe
        budget = 1.03 * recipe.steps * recipe.global_batch * recipe.sequence_length
        makers = {"images": self.image, "captions": self.caption, "videos": self.video, "texts": self.text}
        for kind, share in self.stage.shares.items():
            spent = number = 0
            while spent < share * budget:
                row, tokens = makers[kind](number)
                yield row
                spent += tokens
                number += 1

    def tokens(self) -> int:
        """A length: half of them all that the stage has, the others anything down to a sixteenth of it."""
        longest = self.stage.recipe.sequence_length
        return longest if self.rng.random() < 0.5 else int(longest * 2.0 ** -self.rng.uniform(0, 4))

    def image(self, number: int) -> tuple[dict, int]:
        """One digit in two rows of three, else up to four; every digit in its turn."""
        count = 1 if self.rng.random() < 2 / 3 else int(self.rng.integers(2, 5))
        if number % len(self.digits) == 0:
            self.order = self.rng.permutation(len(self.digits))
        chosen = [int(self.order[number % len(self.digits)]), *self.rng.integers(len(self.digits), size=count - 1).tolist()]
        question = haystack.IMAGE_QUESTION if count == 1 else haystack.IMAGES_QUESTION
        answer = " ".join(str(self.digits.labels[i]) for i in chosen)
        row = _row("<image>" * count + "\n" + question, answer, images=[image_path("train", i) for i in chosen])
        return row, count * (self.processor.config.vision.tokens_per_tile + 2) + 20

    def video(self, number: int) -> tuple[dict, int]:
        tokens = max(self.tokens(), 64)
        count = haystack.video_frames(self.processor, tokens)
        frames, digit = self.videos.frames(count, self.rng)
        return _row("<video>\n" + haystack.VIDEO_QUESTION, str(digit), videos=[self.write(f"{number:04d}", frames)]), tokens

    def caption(self, number: int) -> tuple[dict, int]:
        """A short video, every frame of it described."""
        chosen = self.rng.integers(len(self.digits), size=self.rng.integers(1, LONGEST_CAPTION + 1))
        marked = self.rng.random(len(chosen)) < haystack.CAPTION_MARKS
        frames = np.stack(
            [haystack.mark(self.digits.images[i]) if mark else self.digits.images[i] for i, mark in zip(chosen, marked, strict=True)]
        )
        answer = " ".join(haystack.caption(self.digits.labels[chosen], marked))
        row = _row("<video>\n" + haystack.CAPTION_QUESTION, answer, videos=[self.write(f"caption-{number:04d}", frames)])
        return row, len(chosen) * (self.processor.layout.tokens_per_frame + 1) + 20

    def write(self, name: str, frames: np.ndarray) -> str:
        """Writes a video and returns its path as rows give it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.mp4"
        haystack.write_video(path, frames)
        return path.relative_to(self.material).as_posix()

    def text(self, number: int) -> tuple[dict, int]:
        tokens = max(self.tokens(), 256)
        facts = int(self.rng.integers(1, 9 if tokens < 1024 else 17))
        ask = min(facts, 6 if tokens < 512 else 8)
        needle = haystack.text_needle(self.texts, self.processor, tokens, self.rng, facts=facts, ask=ask)
        return {"messages": needle.sample.messages}, tokens


def _row(question: str, answer: str, **media: list[str]) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **media}
