"""A packed batch: several conversations laid end to end, with no batch dimension and no padding.

Two kinds of boundaries: `cu_seqlens` cuts documents for the attention, `sample_cu_seqlens` cuts samples for the loss. Long-VITA's stages
3 and 4 join samples for the attention and still train each one on its own next tokens.

Shapes: T tokens, N tiles, S pixels per side, P rows a tile fills.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from longvita.config import LongVitaConfig

IGNORE = -100  # label of a token that nothing is learned from


@dataclass(frozen=True, eq=False)
class Batch:
    """What the model reads.

    input_ids          (T,) int64
    cu_seqlens         (documents + 1,) int32: attention boundaries, from 0 to T, non-decreasing
    sample_cu_seqlens  (samples + 1,) int32: loss boundaries, the same form
    position_ids       (T,) int64, for the rotary embedding
    images             (N, 3, S, S) float, normalised, or None
    image_indices      (2, N, P) int64 or None: row 0 the batch index (0 in a packed batch), row 1 the token each feature replaces
    labels             (T,) int64 or None, not shifted: equal to input_ids where supervised, else -100
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    sample_cu_seqlens: Tensor
    position_ids: Tensor
    images: Tensor | None = None
    image_indices: Tensor | None = None
    labels: Tensor | None = None

    @classmethod
    def from_ids(cls, ids: Sequence[Sequence[int]]) -> "Batch":
        """A batch of texts, one document each, positions from 0."""
        lengths = [len(row) for row in ids]
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        flat = torch.tensor([token for row in ids for token in row], dtype=torch.int64)
        positions = torch.tensor([position for n in lengths for position in range(n)], dtype=torch.int64)
        return cls(flat, cu_seqlens, cu_seqlens, positions)

    @classmethod
    def join(cls, batches: Sequence["Batch"]) -> "Batch":
        """One batch of all documents of several, in order. Labels must be in all or in none."""
        if not batches:
            raise ValueError("Batch.join needs at least one batch, got none")
        if len({batch.labels is None for batch in batches}) == 2:
            raise ValueError("Batch.join: some batches have labels and some have none; give labels to all, or to none")
        if len(batches) == 1:
            return batches[0]
        starts = [0, *accumulate(batch.num_tokens for batch in batches[:-1])]
        with_images = [(batch, start) for batch, start in zip(batches, starts, strict=True) if batch.images is not None]

        def boundaries(name):
            parts = [getattr(batch, name)[1:] + start for batch, start in zip(batches, starts, strict=True)]
            return torch.cat([getattr(batches[0], name)[:1], *parts]).to(torch.int32)

        def indices(batch, start):
            return torch.stack([batch.image_indices[0], batch.image_indices[1] + start])

        return cls(
            torch.cat([batch.input_ids for batch in batches]),
            boundaries("cu_seqlens"),
            boundaries("sample_cu_seqlens"),
            torch.cat([batch.position_ids for batch in batches]),
            torch.cat([batch.images for batch, _ in with_images]) if with_images else None,
            torch.cat([indices(batch, start) for batch, start in with_images], dim=1) if with_images else None,
            torch.cat([batch.labels for batch in batches]) if batches[0].labels is not None else None,
        )

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Batch":
        """Every tensor on `device`; the images also in `dtype`. Whole numbers keep their types."""
        moved = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None:
                moved[item.name] = value.to(device, dtype if item.name == "images" else None)
        return Batch(**moved)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        ends = self.cu_seqlens.tolist()
        return [end - start for start, end in pairwise(ends)]

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths, default=0)

    def last_rows(self) -> Tensor:
        """(samples,) int64: the row of every sample's last token; empty samples have none."""
        ends, starts = self.sample_cu_seqlens[1:], self.sample_cu_seqlens[:-1]
        return (ends[ends > starts] - 1).long()

    def shifted_labels(self) -> Tensor:
        """(T,) int64: at every row the token that follows it in the same sample if that token is supervised, else -100."""
        if self.labels is None:
            raise ValueError("this batch has no labels, so there is nothing to learn from: encode it with training=True")
        targets = torch.full_like(self.labels, IGNORE)
        targets[:-1] = self.labels[1:]
        # Nothing follows the last row of a sample. An empty sample points at its predecessor's last row, or (index -1) at the last of all.
        return targets.index_fill(0, self.sample_cu_seqlens[1:].long() - 1, IGNORE) if self.num_tokens else targets

    def validate(self, config: LongVitaConfig | None = None) -> "Batch":
        """Checks shapes, types and, for tensors on the CPU, values. Returns itself. ValueError says expected, got and remedy."""
        total = self.num_tokens
        _expect("input_ids", self.input_ids, torch.int64, (total,))
        _expect("position_ids", self.position_ids, torch.int64, (total,))
        if self.labels is not None:
            _expect("labels", self.labels, torch.int64, (total,))
        for name in ("cu_seqlens", "sample_cu_seqlens"):
            _check_boundaries(name, getattr(self, name), total)
        self._check_images(config)
        if config is not None and self.input_ids.device.type == "cpu" and total:
            _check_range("input_ids", self.input_ids, config.text.vocab_size, "the tokenizer and the model do not belong together")
            limit = config.text.max_position_embeddings
            _check_range("position_ids", self.position_ids, limit, "shorten the input, or raise text.max_position_embeddings")
        return self

    def _check_images(self, config):
        if (self.images is None) != (self.image_indices is None):
            raise ValueError("images and image_indices belong together: got one of them without the other")
        if self.images is None:
            return
        if self.images.dim() != 4 or self.images.shape[1] != 3 or self.images.shape[2] != self.images.shape[3]:
            raise ValueError(f"images must have shape (tiles, 3, size, size), got {tuple(self.images.shape)}")
        if not self.images.is_floating_point():
            raise ValueError(f"images must be normalised floating-point pixels, got {self.images.dtype}")
        tiles, size = self.images.shape[0], self.images.shape[2]
        rows = self.image_indices.shape[-1]
        if config is not None:
            patch = config.vision.patch_size
            if size == 0 or size % (2 * patch):
                raise ValueError(
                    f"images are {size} pixels wide; the model takes multiples of 2 × patch_size = {2 * patch}: resize the tiles"
                )
            rows = (size // patch // 2) ** 2
        _expect("image_indices", self.image_indices, torch.int64, (2, tiles, rows))
        if self.image_indices.device.type == "cpu" and self.image_indices.numel():
            _check_range(
                "image_indices row 1", self.image_indices[1], self.num_tokens, "index the tokens after the whole sequence is laid out"
            )


def _expect(name, tensor, dtype, shape):
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}")


def _check_boundaries(name, cu, total):
    if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(f"{name} must be int32 of shape (documents + 1,), got {cu.dtype} of shape {tuple(cu.shape)}")
    if cu.device.type != "cpu":
        return
    if cu[0] != 0 or cu[-1] != total or (cu[1:] < cu[:-1]).any():
        raise ValueError(
            f"{name} must start at 0, never decrease and end at the number of tokens {total}, got {cu[0]} … {cu[-1]}"
            f"{' with a decrease' if (cu[1:] < cu[:-1]).any() else ''}: it must cover every token exactly once"
        )


def _check_range(name, tensor, limit, remedy):
    low, high = (int(value) for value in torch.aminmax(tensor))
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must lie in 0 … {limit - 1}, got {low if low < 0 else high}: {remedy}")
