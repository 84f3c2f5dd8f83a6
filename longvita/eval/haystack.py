"""Needles and the hay they lie in: one marked frame in a long video of handwritten digits, one code word in a long English text.

Pictures: the 1,797 handwritten digits that ship with scikit-learn (UCI Optical Recognition of Handwritten Digits, 8×8 grey values 0–16),
enlarged to the model's tile size. Words: the help topics that ship with CPython (`pydoc_data.topics`, about 465 KB of English).
Both are split once, by a fixed seed, into a training part and a held-out part: training rows are made of the one, questions of the other.

Shapes: F frames, N images, S pixels a side.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from longvita.data.schema import Sample

IMAGE_QUESTION = "Which digit is this?"
IMAGES_QUESTION = "Which digits are these?"
VIDEO_QUESTION = "Which digit is in the marked frame?"
CAPTION_QUESTION = "Describe every frame."
TEXT_FACT = "Remember the code {name}{digit}."
TEXT_QUESTION = "Which code starts with {name}?"
TEXT_ANSWER = "The code is {name}{digit}."
NAMES = tuple(
    "Oslo Rome Lima Cairo Paris Delhi Tokyo Quito Dakar Hanoi Sofia Turin Minsk Perth Basel Kyoto Lagos Accra Tunis Milan "
    "Leeds Bonn Riga Bern Nice Porto Seoul Osaka Doha Malmo Linz Graz".split()
)
WORDS = tuple("zero one two three four five six seven eight nine".split())
MARK_WORD = "marked"
MARK_RGB = (220, 30, 30)
MARK_SHARE = 8  # the mark is a border of S / 8 pixels: as wide as one patch of the tiny model, so that it survives video compression
CAPTION_MARKS = 0.25  # share of marked frames where every frame is described
HELD_OUT = 0.2


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images (N, S, S, 3) uint8, dark strokes on a light ground, and labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def of(self) -> tuple[np.ndarray, ...]:
        """The indices of every digit, 0 to 9."""
        return tuple(np.flatnonzero(self.labels == digit) for digit in range(10))


@functools.cache
def load_digits(size: int = 32, seed: int = 0) -> tuple[Digits, Digits]:
    """(training, held out). ValueError, with the remedy, when scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise ValueError('the handwritten digits come with scikit-learn, which is not installed: pip install "longvita[demo]"') from error
    from PIL import Image

    raw = sklearn_digits()
    grey = (255 - raw.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")) for g in grey])
    order = np.random.default_rng(seed).permutation(len(images))
    cut = int(len(order) * (1 - HELD_OUT))
    labels = raw.target.astype(np.int64)
    return Digits(images[order[:cut]], labels[order[:cut]]), Digits(images[order[cut:]], labels[order[cut:]])


@functools.cache
def load_prose(seed: int = 0) -> tuple[str, str]:
    """(training, held out): whole help topics, and no sentence of the one in the other (some topics share sections)."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    order = np.random.default_rng(seed).permutation(len(names))
    cut = int(len(order) * (1 - HELD_OUT))
    train, held_out = ([_sentences(topics[names[i]]) for i in part] for part in (order[:cut], order[cut:]))
    known = {sentence for topic in train for sentence in topic}
    return " ".join(itertools.chain(*train)), " ".join(s for topic in held_out for s in topic if s not in known)


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", re.sub(r"\s+", " ", text).strip())


def mark(frame_SS3: np.ndarray) -> np.ndarray:
    """A copy of the frame with the mark, a coloured border."""
    width = max(1, frame_SS3.shape[0] // MARK_SHARE)
    out = np.empty_like(frame_SS3)
    out[:] = MARK_RGB
    out[width:-width, width:-width] = frame_SS3[width:-width, width:-width]
    return out


def write_video(path: str | os.PathLike, frames_FSS3: np.ndarray) -> None:
    """An H.264 MP4 at one frame per second, which browsers play too."""
    import av

    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt = frames_FSS3.shape[2], frames_FSS3.shape[1], "yuv420p"
        stream.thread_count = 1  # one thread: the frames are tiny, and the file is the same on every machine
        for frame in frames_FSS3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@dataclass(frozen=True)
class Needle:
    """A question, and what its answer must name: a digit of a video ("7") or a whole code of a text ("Tunis8")."""

    sample: Sample
    answer: str


@dataclass(frozen=True)
class VideoHay:
    """Makes frames of digits with one of them marked; `digits` is the split they come from."""

    digits: Digits

    def frames(self, count: int, rng: np.random.Generator, *, depth: float | None = None, needle: bool = True) -> tuple[np.ndarray, int]:
        """((F, S, S, 3), digit): the marked frame lies at `depth` (0 first, 1 last; None: anywhere).

        needle=False shows another frame in its place, unmarked, so that no frame tells the digit.
        """
        digit = int(rng.integers(10))
        chosen = rng.integers(len(self.digits), size=count)
        place = int(rng.integers(count)) if depth is None else round(depth * (count - 1))
        marked = rng.choice(self.digits.of[digit])
        if needle:
            chosen[place] = marked
        frames = self.digits.images[chosen]
        if needle:
            frames[place] = mark(frames[place])
        return frames, digit


@dataclass(frozen=True)
class TextHay:
    """Makes passages of a given number of tokens with facts in them."""

    prose: str
    tokenizer: object
    words: list[str] = field(init=False, repr=False)
    _ends: np.ndarray = field(init=False, repr=False)  # tokens up to and including each word

    def __post_init__(self):
        words = self.prose.split(" ")
        counts = {word: len(self.tokenizer.encode(" " + word)) for word in set(words)}
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "_ends", np.cumsum([counts[word] for word in words]))

    def passage(self, tokens: int, rng: np.random.Generator, facts: Sequence[str], depths: Sequence[float | None]) -> str:
        """About `tokens` tokens of prose (never more; facts not counted) with each fact at its depth, after the nearest sentence end."""
        last = int(np.searchsorted(self._ends, self._ends[-1] - tokens))
        if last < 1:
            raise ValueError(f"expected a passage of at most {self._ends[-1]} tokens, all there are in this split; got {tokens}")
        start = int(rng.integers(last))
        before = self._ends[start - 1] if start else 0
        end = int(np.searchsorted(self._ends, before + tokens, side="right"))
        words = self.words[start:end]
        depths = [rng.random() if depth is None else depth for depth in depths]
        places = [self._sentence_end(words, int(np.searchsorted(self._ends, before + depth * tokens)) - start) for depth in depths]
        for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
            words[place:place] = [fact]
        return " ".join(words)

    @staticmethod
    def _sentence_end(words: list[str], place: int) -> int:
        """The nearest gap after a full stop within 30 words, else the gap itself."""
        place = min(max(place, 0), len(words))
        for distance in range(30):
            for gap in (place - distance, place + distance):
                if 0 <= gap <= len(words) and (gap in (0, len(words)) or words[gap - 1].endswith(".")):
                    return gap
        return place


def text_needle(
    hay: TextHay, processor, tokens: int, rng: np.random.Generator, *, depth: float | None = None, facts: int = 1, ask: int = 1,
    needle: bool = True,
) -> Needle:  # fmt: skip
    """A text of `tokens` tokens in all, `facts` codes in it, and questions about `ask` of them (one turn each; the last unanswered).

    The answer is the last question's. `depth` places the fact that the last question asks for; needle=False leaves that fact out.
    """
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:facts]]
    digits = rng.integers(10, size=facts)
    turns = []
    for name, digit in zip(names[:ask], digits, strict=False):
        turns += [
            {"role": "user", "content": TEXT_QUESTION.format(name=name)},
            {"role": "assistant", "content": TEXT_ANSWER.format(name=name, digit=digit)},
        ]
    told = [TEXT_FACT.format(name=name, digit=digit) for name, digit in zip(names, digits, strict=True)]
    depths = [depth if i == ask - 1 else None for i in range(facts)]
    if not needle:
        del told[ask - 1], depths[ask - 1]
    question = turns[0]["content"]
    turns[0]["content"] = f"{' '.join(told)}\n{question}"
    sample = Sample(turns, placeholders=False)
    room = tokens - processor.encode(sample).num_tokens
    seed = int(rng.integers(2**32))
    excess = 1
    while excess > 0:  # words and facts side by side may take a token more than alone: then the same passage, a little shorter
        room -= excess
        if room < 1:
            raise ValueError(f"expected at least {tokens - room + 1} tokens for {facts} codes and {ask} questions, got {tokens}")
        turns[0]["content"] = f"{hay.passage(room, np.random.default_rng(seed), told, depths)}\n{question}"
        excess = processor.encode(sample).num_tokens - tokens
    return Needle(sample, f"{names[ask - 1]}{digits[ask - 1]}")


def video_frames(processor, tokens: int) -> int:
    """How many frames fit into `tokens` tokens beside the question and its answer."""
    turns = [{"role": "user", "content": "\n" + VIDEO_QUESTION}, {"role": "assistant", "content": "0"}]
    frames = (tokens - processor.encode(Sample(turns, placeholders=False)).num_tokens) // processor.layout.tokens_per_frame
    if frames < 1:
        raise ValueError(f"expected room for at least one frame of {processor.layout.tokens_per_frame} tokens, got {tokens} in all")
    return frames


def video_turns(path: str | os.PathLike, digit: int) -> list[dict]:
    """The row of a video question: its user turn and its answer."""
    content = [{"type": "video", "video": os.fspath(path)}, {"type": "text", "text": "\n" + VIDEO_QUESTION}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": str(digit)}]


# ---- the same questions without pixels ----


def spelled_images(count: int, rng: np.random.Generator) -> Sample:
    """The image question with words for pictures ("seven three"): what a language model knows of it before it can see."""
    digits = rng.integers(10, size=count)
    question = IMAGE_QUESTION if count == 1 else IMAGES_QUESTION
    return _spelled([WORDS[d] for d in digits], question, " ".join(map(str, digits)))


def spelled_video(count: int, rng: np.random.Generator) -> Sample:
    """The video question with words for frames: "two nine marked seven two"."""
    digits = rng.integers(10, size=count)
    place = int(rng.integers(count))
    return _spelled(caption(digits, np.arange(count) == place), VIDEO_QUESTION, str(digits[place]))


def spelled_caption(count: int, rng: np.random.Generator) -> Sample:
    """A list of frames in words, to be repeated."""
    words = caption(rng.integers(10, size=count), rng.random(count) < CAPTION_MARKS)
    return _spelled(words, CAPTION_QUESTION, " ".join(words))


def caption(digits: Sequence[int], marked: Sequence[bool]) -> list[str]:
    """What there is to say of every frame: "seven", or "marked seven"."""
    return [f"{MARK_WORD} {WORDS[digit]}" if mark else WORDS[digit] for digit, mark in zip(digits, marked, strict=True)]


def _spelled(words: list[str], question: str, answer: str) -> Sample:
    content = f" {' '.join(words)}\n{question}"  # the leading blank gives the first word the token that the others have
    return Sample([{"role": "user", "content": content}, {"role": "assistant", "content": answer}], placeholders=False)
