"""A conversation with its media as one encoded sample; samples as the packed Batch the model reads.

    processor = Processor(config, tokenizer)
    batch = processor([{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "What is this?"}]}])
    row = collate([processor.encode(a), processor.encode(b)], reset=True)

`encode` reads headers only and lays out all tokens; pixels are decoded by `EncodedSample.loaded()`, which `collate` calls.
Shapes: T tokens, N tiles, S pixels per side, P tokens per tile.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from longvita.config import LongVitaConfig
from longvita.data import media, tiling
from longvita.data.media import MediaError, MediaLimits
from longvita.data.schema import DataError, Part, Turn, as_sample
from longvita.data.template import ChatTokenizer, Layout
from longvita.model.batch import IGNORE, Batch
from longvita.model.checkpoint_io import atomic_write_json

if TYPE_CHECKING:
    from longvita.data.video import FileVideo

SETTINGS_FILE = "processor.json"


@dataclass(frozen=True, eq=False)
class EncodedSample:
    """One sample, laid out.

    input_ids  (T,) int32
    labels     (T,) int32: input_ids where supervised, else -100
    tile_rows  (N, P) int32: the tokens that the tiles' features replace, counted from the sample's start
    tiles      (N, S, S, 3) uint8, or None before `loaded()`
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tile_rows: np.ndarray
    tiles: np.ndarray | None
    media: tuple[Callable[[], np.ndarray], ...] = ()
    where: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def loaded(self) -> "EncodedSample":
        """The same sample with its pixels. MediaError if a file turns out broken on the way."""
        if self.tiles is not None:
            return self
        try:
            pieces = [load() for load in self.media]
        except MediaError as error:
            raise error.at(self.where) from None
        return dataclasses.replace(self, tiles=pieces[0] if len(pieces) == 1 else np.concatenate(pieces), media=())


class Processor:
    """Turns conversations into tokens and tiles for one model.

    config     the model's; its tokens must be the tokenizer's
    limits     what media may be and cost; a path root is a matter of the running program and is not saved
    max_tiles  of an image, thumbnail not counted
    max_fps    frames per second taken from a video at most
    """

    def __init__(
        self,
        config: LongVitaConfig,
        tokenizer: ChatTokenizer,
        limits: MediaLimits | None = None,
        *,
        max_tiles: int = 12,
        max_fps: float = 1.0,
    ):
        _check_tokens(config, tokenizer)
        if not max_fps > 0:
            raise ValueError(f"max_fps must be a positive number of frames per second, got {max_fps!r}")
        tiling.candidate_grids(max_tiles)
        self.config, self.tokenizer, self.limits = config, tokenizer, limits if limits is not None else MediaLimits()
        self.max_tiles, self.max_fps, self.tile = max_tiles, float(max_fps), config.vision.image_size
        self.layout = Layout(tokenizer, config.vision.tokens_per_tile)

    # ---- use ----

    def __call__(self, messages, *, training: bool = False, max_tokens: int | None = None, max_frames: int | None = None) -> Batch:
        """One conversation or several as a packed Batch, one document each, ready to be answered (or, with `training`, to be learned).

        messages    a list of messages, a Sample or a row; or a list of these
        max_tokens  of each conversation: videos get the frames that fit beside the text. Leave room for the answer
        """
        several = isinstance(messages, list | tuple) and messages and not (isinstance(messages[0], Mapping) and "role" in messages[0])
        items = [as_sample(item, "conversation", i) for i, item in enumerate(messages)] if several else [messages]
        samples = [self.encode(item, training=training, max_tokens=max_tokens, max_frames=max_frames) for item in items]
        return collate(samples, reset=True, labels=training)

    def encode(self, sample, *, training: bool = True, max_tokens: int | None = None, max_frames: int | None = None) -> EncodedSample:
        """Lays out one conversation. DataError says why it cannot be: bad row, bad medium, or "too_long" for max_tokens.

        max_tokens  default: the model's longest position
        max_frames  of each video, besides what max_tokens leaves and limits.max_frames
        """
        sample = as_sample(sample)
        max_tokens = self.config.text.max_position_embeddings if max_tokens is None else max_tokens
        for name, value in (("max_tokens", max_tokens), ("max_frames", max_frames)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        try:
            pieces = self._pieces(sample.turns(training=training), training)
            self._plan_videos(
                [piece for piece in pieces if isinstance(piece, _Video)], sum(piece.num_tokens for piece in pieces), max_tokens, max_frames
            )
        except DataError as error:
            raise error.at(sample.where) from None
        ids = np.concatenate([piece.ids(self.layout) for piece in pieces])
        if len(ids) > max_tokens:
            remedy = "shorten the text, use fewer or smaller images, or raise the sequence length"
            raise DataError("too_long", f"expected at most {max_tokens} tokens, got {len(ids)}; {remedy}", sample.where)
        supervised = np.repeat([piece.supervised for piece in pieces], [piece.num_tokens for piece in pieces])
        loads = tuple(functools.partial(piece.load, self.tile) for piece in pieces if not isinstance(piece, _Text))
        tiles = None if loads else np.empty((0, self.tile, self.tile, 3), dtype=np.uint8)
        return EncodedSample(ids, np.where(supervised, ids, np.int32(IGNORE)), self.layout.tile_rows(ids), tiles, loads, sample.where)

    # ---- the layout of one sample ----

    def _pieces(self, turns: Sequence[Turn], training: bool) -> list:
        pieces = []
        for turn in turns:
            answer = turn.role == "assistant"
            pieces.append(_Text(self.layout.turn_start(turn.role)))
            pieces += [self._piece(part, answer) for part in turn.parts]
            pieces.append(_Text(self.layout.turn_end, answer))
        if not training:
            pieces.append(_Text(self.layout.turn_start("assistant")))
        return pieces

    def _piece(self, part: Part, supervised: bool):
        if part.kind == "text":
            return _Text(self.layout.text(part.value), supervised)
        if part.kind == "image":
            image = media.open_image(part.value, self.limits)
            grid = tiling.choose_grid(*image.size, self.tile, self.max_tiles)
            return _Image(image, grid, len(self.layout.image(*grid)))
        return _Video(media.open_video(part.value, self.limits))

    def _plan_videos(self, videos: list["_Video"], used: int, max_tokens: int, max_frames: int | None) -> None:
        """Chooses the frames of every video: what rate and caps allow, and what fits beside everything else, shared fairly."""
        cap = self.limits.max_frames if max_frames is None else min(max_frames, self.limits.max_frames)
        room = (max_tokens - used) // self.layout.tokens_per_frame
        if videos and room < len(videos):
            raise DataError(
                "too_long",
                f"expected room for a frame of every video ({len(videos)} × {self.layout.tokens_per_frame} tokens) in {max_tokens} tokens, "
                f"got {used} tokens of text and images; shorten them or raise the sequence length",
            )
        wanted = [len(media.sample_frames(v.video.num_frames, v.video.fps, cap, self.max_fps)) for v in videos]
        for number in sorted(range(len(videos)), key=lambda i: wanted[i]):  # short videos leave their share to the long ones
            share = room // sum(v.indices is None for v in videos)
            video = videos[number]
            video.indices = media.sample_frames(video.video.num_frames, video.video.fps, min(cap, share), self.max_fps)
            video.num_tokens = len(video.indices) * self.layout.tokens_per_frame
            room -= len(video.indices)

    # ---- keeping ----

    def settings(self) -> dict:
        """What `save` writes besides the tokenizer."""
        limits = dataclasses.asdict(self.limits)
        del limits["root"]
        return {"max_tiles": self.max_tiles, "max_fps": self.max_fps, "limits": limits}

    def fingerprint(self) -> str:
        """Changes whenever a conversation could be laid out differently."""
        state = [self.settings(), dataclasses.asdict(self.config.vision), self.tokenizer.tokenizer.to_str()]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, directory: str | os.PathLike) -> None:
        """Writes tokenizer.json and processor.json, each of them wholly or not at all."""
        os.makedirs(directory, exist_ok=True)
        self.tokenizer.save(directory)
        atomic_write_json(os.path.join(directory, SETTINGS_FILE), self.settings())

    @classmethod
    def from_dir(cls, directory: str | os.PathLike, config: LongVitaConfig, *, limits: MediaLimits | None = None) -> "Processor":
        """The inverse of `save`; a directory with a tokenizer alone gets the defaults. `limits` replaces the saved ones."""
        tokenizer = ChatTokenizer.from_file(os.fspath(directory))
        path = os.path.join(directory, SETTINGS_FILE)
        settings = {}
        if os.path.exists(path):
            try:
                with open(path, encoding="utf-8") as file:
                    settings = json.load(file)
                if not isinstance(settings, dict):
                    raise ValueError(f"a {type(settings).__name__}")
                settings["limits"] = MediaLimits(**settings.get("limits", {}))
            except (OSError, ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}: expected the settings of a processor, got something else ({error}); remove the file for the defaults"
                ) from None
        if limits is not None:
            settings["limits"] = limits
        try:
            return cls(config, tokenizer, **settings)
        except TypeError as error:
            raise ValueError(
                f"{path}: expected max_tiles, max_fps and limits, got other keys ({error}); remove the file for the defaults"
            ) from None


def _check_tokens(config: LongVitaConfig, tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.token_ids
    for field in dataclasses.fields(ids):
        expected, got = getattr(config.tokens, field.name), getattr(ids, field.name)
        if expected != got and not (field.name == "newline" and expected is None):
            raise ValueError(
                f"expected the tokenizer's {field.name} to be the config's {expected}, got {got}; load the tokenizer saved with the model, "
                "or build the config with dataclasses.replace(config, tokens=tokenizer.token_ids)"
            )
    if len(tokenizer) > config.text.vocab_size:
        raise ValueError(
            f"expected a tokenizer of at most text.vocab_size = {config.text.vocab_size} ids, got {len(tokenizer)}; "
            "raise vocab_size or train a smaller one"
        )


@dataclass
class _Text:
    tokens: np.ndarray
    supervised: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def ids(self, layout: Layout) -> np.ndarray:
        return self.tokens


@dataclass
class _Image:
    image: media.StillImage
    grid: tuple[int, int]
    num_tokens: int
    supervised: bool = False

    def ids(self, layout: Layout) -> np.ndarray:
        return layout.image(*self.grid)

    def load(self, tile: int) -> np.ndarray:
        return tiling.cut(self.image.load(), self.grid, tile)


@dataclass
class _Video:
    video: "media.FrameVideo | FileVideo"
    indices: list[int] | None = None  # chosen once everything else is laid out
    num_tokens: int = 0
    supervised: bool = False

    def ids(self, layout: Layout) -> np.ndarray:
        return layout.video(len(self.indices))

    def load(self, tile: int) -> np.ndarray:
        return self.video.read(self.indices, tile)


def collate(samples: Sequence[EncodedSample], *, reset: bool, labels: bool = True) -> Batch:
    """A packed row of samples.

    reset   True: one attention document per sample, positions from 0 (stages 1 and 2). False: one document over the whole row, positions
            run on (stages 3 and 4). The loss keeps the samples apart either way.
    labels  False leaves them out.
    """
    if not samples:
        raise ValueError("collate needs at least one sample, got none")
    samples = [sample.loaded() for sample in samples]
    lengths = [sample.num_tokens for sample in samples]
    total = sum(lengths)
    starts = np.cumsum([0, *lengths])
    position_ids = np.arange(total, dtype=np.int64)
    if reset:
        position_ids -= np.repeat(starts[:-1], lengths)
    boundaries = torch.from_numpy(starts.astype(np.int32))
    images, image_indices = _collate_tiles(samples, starts)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)),
        cu_seqlens=boundaries if reset else torch.tensor([0, total], dtype=torch.int32),
        sample_cu_seqlens=boundaries,
        position_ids=torch.from_numpy(position_ids),
        images=images,
        image_indices=image_indices,
        labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples]).astype(np.int64)) if labels else None,
    )


def _collate_tiles(samples: Sequence[EncodedSample], starts: np.ndarray) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    count = sum(len(sample.tiles) for sample in samples)
    if not count:
        return None, None
    side = samples[0].tiles.shape[1]
    images_N3SS = torch.empty((count, 3, side, side), dtype=torch.float32)
    first = 0
    for sample in samples:
        last = first + len(sample.tiles)
        tiling.normalise(sample.tiles, images_N3SS[first:last].numpy())
        first = last
    rows_NP = np.concatenate([sample.tile_rows.astype(np.int64) + start for sample, start in zip(samples, starts[:-1], strict=True)])
    return images_N3SS, torch.from_numpy(np.stack([np.zeros_like(rows_NP), rows_NP]))
