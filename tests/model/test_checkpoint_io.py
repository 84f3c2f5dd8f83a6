"""Checkpoint directories: manifests find every change, the newest whole one wins, weights match by name and shape."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvita import LongVita, presets
from longvita.model.checkpoint_io import (
    CheckpointError,
    atomic_write_bytes,
    atomic_write_json,
    list_checkpoints,
    load_weights,
    newest_valid_checkpoint,
    read_json,
    save_weights,
    verify,
    write_manifest,
)

TINY = presets["tiny"]


def checkpoint(run, step, content=b"weights"):
    directory = run / "checkpoints" / f"step-{step:06d}"
    (directory / "optimizer").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(content)
    (directory / "optimizer" / "shard").write_bytes(bytes(range(100)))
    write_manifest(directory)
    return directory


# ---- atomic files ----


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "state.json"
    atomic_write_json(path, {"step": 1})
    atomic_write_json(path, {"step": 2})
    assert read_json(path) == {"step": 2} and os.listdir(tmp_path) == ["state.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    atomic_write_bytes(path, b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state.json"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("[1]", "must hold a JSON object, got list"), ("{", "not valid JSON"), (None, "is missing")])
def test_read_json_says_what_is_wrong(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "x.json")


# ---- manifests ----


def test_manifest_names_every_file(tmp_path):
    directory = checkpoint(tmp_path, 1)
    verify(directory)
    entries = read_json(directory / "MANIFEST.json")["files"]
    assert entries.keys() == {"model.safetensors", "optimizer/shard"}
    assert entries["model.safetensors"]["bytes"] == 7 and len(entries["model.safetensors"]["sha256"]) == 64


def test_every_flipped_bit_is_found(tmp_path):
    directory = checkpoint(tmp_path, 1)
    path = directory / "optimizer" / "shard"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="optimizer/shard does not match its SHA-256"):
            verify(directory)
    path.write_bytes(whole)
    verify(directory)


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    steps = {step: checkpoint(tmp_path, step) for step in (2, 10, 30, 400, 5000, 60000)}
    (tmp_path / "checkpoints" / "step-000900.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-000901").touch()
    assert list_checkpoints(tmp_path) == list(steps.values())
    assert newest_valid_checkpoint(tmp_path) == (steps[60000], [])
    (steps[60000] / "MANIFEST.json").unlink()
    (steps[5000] / "model.safetensors").write_bytes(b"weight")
    (steps[400] / "model.safetensors").unlink()
    atomic_write_json(steps[30] / "MANIFEST.json", {"files": {}})
    path, skipped = newest_valid_checkpoint(tmp_path)
    assert path == steps[10]
    assert [directory for directory, _ in skipped] == [steps[60000], steps[5000], steps[400], steps[30]]
    reasons = ("MANIFEST.json is missing", "has 6 bytes, the manifest says 7", "is missing", "lists no files")
    for (_, reason), expected in zip(skipped, reasons, strict=True):
        assert expected in reason
    atomic_write_json(steps[10] / "MANIFEST.json", {"files": {"model.safetensors": {"bytes": 7}}})
    path, skipped = newest_valid_checkpoint(tmp_path)
    assert path == steps[2] and "needs bytes and sha256" in skipped[-1][1]
    assert newest_valid_checkpoint(tmp_path / "nowhere") == (None, [])


# ---- weights ----


def test_weights_round_trip_bit_for_bit(tmp_path):
    model = LongVita(TINY).init_weights(3)
    save_weights(model, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    other = LongVita(TINY, device="meta")
    other.set_trainable({"projector"})
    load_weights(other, tmp_path / "model.safetensors")
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and b.requires_grad == name.startswith("model.vision_projection")
    load_weights(other, tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert torch.equal(other.head_weight, model.head_weight.bfloat16())


def test_wrong_weights_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    state = dict(LongVita(TINY).init_weights(0).state_dict())
    model = LongVita(TINY, device="meta")

    def refused(tensors, message):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, path)

    refused({k: v for k, v in state.items() if k != "model.norm.weight"}, "missing model.norm.weight.*Does config.json belong")
    refused({**state, "model.extra": torch.zeros(1)}, "unknown model.extra")
    refused({**state, "model.norm.weight": torch.zeros(64)}, r"model.norm.weight has shape \(64,\), the model \(128,\)")
    refused({"model.norm.weight": torch.zeros(128)}, "and [0-9]+ more")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_weights(model, path)
    with pytest.raises(CheckpointError, match="nowhere is missing"):
        load_weights(model, tmp_path / "nowhere")
