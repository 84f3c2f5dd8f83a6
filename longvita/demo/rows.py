"""The rows that the demo trains on, as they stand in its JSONL files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longvita.data.processor import Processor
from longvita.demo.plan import StagePlan
from longvita.eval import haystack
from longvita.eval.haystack import TextHay, VideoHay

LONGEST_CAPTION = 12  # frames
SHORTEST = {"videos": 64, "texts": 128}  # tokens
EXTRA_TOKENS = 20  # of a question and its answer, about


def image_path(split: str, number: int) -> str:
    """Where a digit of a split ("train", "held_out") lies, relative to the material."""
    return f"images/{split}/{number:04d}.jpg"


class RowMaker:
    """Makes one stage's rows and writes the videos they name."""

    def __init__(self, material: Path, stage: StagePlan, processor: Processor, rng: np.random.Generator):
        self.material, self.stage, self.processor, self.rng = material, stage, processor, rng
        self.digits = haystack.load_digits()[0]
        self.videos = VideoHay(self.digits)
        self.texts = TextHay(haystack.load_prose()[0], processor.tokenizer)
        self.makers = {"images": self.image, "captions": self.caption, "videos": self.video, "texts": self.text, "mixed": self.mixed}
        self._deck: list[int] = []
        self._written = 0

    def rows(self) -> Iterator[dict]:
        """Rows of a little more than the tokens that the stage reads, kind by kind."""
        recipe = self.stage.recipe
        budget = 1.03 * recipe.steps * recipe.global_batch * recipe.sequence_length
        for kind, share in self.stage.shares.items():
            spent = 0
            while spent < share * budget:
                row, tokens = self.makers[kind](recipe.sequence_length)
                yield row
                spent += tokens

    # ---- one row of at most `longest` tokens, and about how many it has ----

    def image(self, longest: int) -> tuple[dict, int]:
        """One digit in two rows of three, else up to four; every digit comes once before any comes again."""
        count = 1 if self.rng.random() < 2 / 3 else int(self.rng.integers(2, 5))
        if len(self._deck) < count:
            self._deck = self.rng.permutation(len(self.digits)).tolist()
        chosen = [self._deck.pop() for _ in range(count)]
        question = haystack.IMAGE_QUESTION if count == 1 else haystack.IMAGES_QUESTION
        answer = " ".join(str(self.digits.labels[i]) for i in chosen)
        row = _row("<image>" * count + "\n" + question, answer, images=[image_path("train", i) for i in chosen])
        return row, count * (self.processor.config.vision.tokens_per_tile + 2) + EXTRA_TOKENS

    def caption(self, longest: int) -> tuple[dict, int]:
        """A short video, every frame of it described."""
        per_frame = self.processor.layout.tokens_per_frame + 2  # "marked seven"
        count = int(self.rng.integers(1, min(LONGEST_CAPTION, (longest - EXTRA_TOKENS) // per_frame) + 1))
        chosen = self.rng.integers(len(self.digits), size=count)
        marked = self.rng.random(count) < haystack.CAPTION_MARKS
        frames = self.digits.images[chosen]
        for place in np.flatnonzero(marked):
            frames[place] = haystack.mark(frames[place])
        answer = " ".join(haystack.caption(self.digits.labels[chosen], marked))
        return _row("<video>\n" + haystack.CAPTION_QUESTION, answer, videos=[self._write(frames)]), count * per_frame + EXTRA_TOKENS

    def video(self, longest: int) -> tuple[dict, int]:
        tokens = self._tokens("videos", longest)
        frames, digit = self.videos.frames(haystack.video_frames(self.processor, tokens), self.rng)
        return _row("<video>\n" + haystack.VIDEO_QUESTION, str(digit), videos=[self._write(frames)]), tokens

    def text(self, longest: int) -> tuple[dict, int]:
        tokens = self._tokens("texts", longest)
        facts = int(self.rng.integers(1, min(25, max(3, tokens // 64))))
        ask = min(facts, 16, max(1, tokens // 96))
        needle = haystack.text_needle(self.texts, self.processor, tokens, self.rng, facts=facts, ask=ask)
        return {"messages": needle.sample.messages}, tokens

    def mixed(self, longest: int) -> tuple[dict, int]:
        """One conversation about several of the above, one after the other."""
        kinds = self.rng.choice(["images", "captions", "videos", "texts"], size=self.rng.integers(2, 5))
        pieces = [self.makers[kind](longest // len(kinds)) for kind in kinds]
        row = {key: [item for piece, _ in pieces for item in piece.get(key, [])] for key in ("messages", "images", "videos")}
        return row, sum(tokens for _, tokens in pieces)

    def _tokens(self, kind: str, longest: int) -> int:
        """A length: `longest` in half of the rows. The others go down to a sixteenth of it; in stages that join their samples only to half,
        so that no row holds two needles and leaves open which one is asked for."""
        tokens = longest if self.rng.random() < 0.5 else int(longest * 2.0 ** -self.rng.uniform(0, 4 if self.stage.recipe.reset else 1))
        return max(tokens, SHORTEST[kind])

    def _write(self, frames: np.ndarray) -> str:
        """Writes a video and returns its path as rows give it."""
        path = self.material / "videos" / self.stage.name / f"{self._written:04d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        haystack.write_video(path, frames)
        self._written += 1
        return path.relative_to(self.material).as_posix()


def _row(question: str, answer: str, **media: list[str]) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **media}
