"""Packed batches: boundaries, shifted labels, joining, error messages."""

import dataclasses

import pytest
import torch

from longvita import Batch, presets


def three_documents():
    return Batch.from_ids([[1, 2, 3], [], [4, 5]])


def with_images(tiles=2, tokens=40):
    batch = Batch.from_ids([list(range(1, tokens + 1))])
    rows = torch.arange(tiles * 16).view(tiles, 16) + 3
    return dataclasses.replace(batch, images=torch.zeros(tiles, 3, 32, 32), image_indices=torch.stack([torch.zeros_like(rows), rows]))


def test_from_ids():
    batch = three_documents().validate(presets["tiny"])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5] and batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 5] and batch.lengths == [3, 0, 2]
    assert batch.num_tokens == 5 and batch.max_seqlen == 3 and batch.last_rows().tolist() == [2, 4]
    empty = Batch.from_ids([]).validate()
    assert empty.num_tokens == 0 and empty.max_seqlen == 0 and empty.last_rows().tolist() == []


def test_labels_shift_within_samples():
    labels = torch.tensor([10, 11, -100, 13, 14, 15])
    batch = Batch.from_ids([[0] * 6])  # one document for the attention, four samples (one of them empty) for the loss
    batch = dataclasses.replace(batch, labels=labels, sample_cu_seqlens=torch.tensor([0, 0, 3, 4, 6], dtype=torch.int32))
    assert batch.shifted_labels().tolist() == [11, -100, -100, -100, 15, -100]
    assert labels.tolist() == [10, 11, -100, 13, 14, 15]
    nothing = dataclasses.replace(Batch.from_ids([]), labels=torch.empty(0, dtype=torch.int64))
    assert nothing.shifted_labels().tolist() == []


def test_labels_are_asked_for():
    with pytest.raises(ValueError, match="no labels.*training=True"):
        three_documents().shifted_labels()


def test_join_moves_boundaries_and_image_rows():
    text, image = three_documents(), with_images()
    joined = Batch.join([text, image, text]).validate(presets["tiny"])
    assert joined.cu_seqlens.tolist() == [0, 3, 3, 5, 45, 48, 48, 50]
    assert joined.sample_cu_seqlens.tolist() == joined.cu_seqlens.tolist()
    assert joined.image_indices[1].tolist() == (image.image_indices[1] + 5).tolist()
    assert joined.position_ids[5:45].tolist() == list(range(40))
    assert Batch.join([text]) is text
    with pytest.raises(ValueError, match="at least one batch"):
        Batch.join([])
    with pytest.raises(ValueError, match="some batches have labels and some have none"):
        Batch.join([text, dataclasses.replace(text, labels=text.input_ids)])


def test_to_casts_images_only():
    moved = with_images().to("cpu", torch.bfloat16)
    assert moved.images.dtype == torch.bfloat16 and moved.input_ids.dtype == torch.int64 and moved.cu_seqlens.dtype == torch.int32
    assert moved.labels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(5)}, "input_ids must be torch.int64"),
        ({"position_ids": torch.zeros(4, dtype=torch.int64)}, r"position_ids must be torch.int64 of shape \(5,\), got .* \(4,\)"),
        ({"labels": torch.zeros(5, 1, dtype=torch.int64)}, "labels must be"),
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "cu_seqlens must start at 0.* number of tokens 5, got 0 … 3"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5], dtype=torch.int32)}, "with a decrease"),
        ({"sample_cu_seqlens": torch.tensor([1, 5], dtype=torch.int32)}, "sample_cu_seqlens must start at 0"),
        ({"input_ids": torch.tensor([0, 1, 2, 3, 512])}, "input_ids must lie in 0 … 511, got 512: the tokenizer and the model"),
        ({"input_ids": torch.tensor([0, 1, 2, -3, 5])}, "input_ids must lie in 0 … 511, got -3"),
        ({"position_ids": torch.full((5,), 16384)}, "position_ids must lie in 0 … 16383.*max_position_embeddings"),
        ({"images": torch.zeros(1, 3, 32, 32)}, "images and image_indices belong together"),
    ],
)
def test_errors_teach(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(three_documents(), **change).validate(presets["tiny"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 32, 24)}, r"images must have shape \(tiles, 3, size, size\)"),
        ({"images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "normalised floating-point pixels, got torch.uint8"),
        ({"images": torch.zeros(2, 3, 36, 36)}, "images are 36 pixels wide; the model takes multiples of 2 × patch_size = 8"),
        ({"images": torch.zeros(3, 3, 32, 32)}, r"image_indices must be torch.int64 of shape \(2, 3, 16\)"),
        ({"images": torch.zeros(2, 3, 64, 64)}, r"image_indices must be torch.int64 of shape \(2, 2, 64\)"),
        ({"image_indices": torch.full((2, 2, 16), 40)}, "image_indices row 1 must lie in 0 … 39, got 40: .*after the whole sequence"),
    ],
)
def test_image_errors_teach(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(with_images(), **change).validate(presets["tiny"])
