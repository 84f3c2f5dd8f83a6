"""`longvita.load` from run directories and from plain ones, and what it says when something is missing."""

import dataclasses
import json

import pytest
import torch

import longvita
from longvita import LongVita, presets
from longvita.data.template import ChatTokenizer
from longvita.model.checkpoint_io import save_weights, write_manifest


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer.train_bpe(["a few words"], 280)


@pytest.fixture(scope="module")
def models(tokenizer):
    config = dataclasses.replace(presets["tiny"], tokens=tokenizer.token_ids)
    return {step: LongVita(config).init_weights(step, 0.2) for step in (1, 2)}


@pytest.fixture
def run(tmp_path, models, tokenizer):
    """A run directory with two checkpoints."""
    (tmp_path / "config.json").write_text(json.dumps({"model": models[1].config.to_dict(), "recipe": {"name": "stage1"}}))
    tokenizer.save(tmp_path)
    for step, model in models.items():
        directory = tmp_path / "checkpoints" / f"step-{step:06d}"
        directory.mkdir(parents=True)
        save_weights(model, directory / "model.safetensors")
        write_manifest(directory)
    return tmp_path


@pytest.fixture
def plain(tmp_path, models, tokenizer):
    models[1].config.save(tmp_path / "config.json")
    tokenizer.save(tmp_path)
    save_weights(models[1], tmp_path / "model.safetensors")
    return tmp_path


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_run_directory_gives_the_newest_checkpoint(run, models):
    model, processor = longvita.load(run)
    assert same(model, models[2]) and model.config == models[1].config and not model.training
    batch = processor([{"role": "user", "content": "words"}])
    assert torch.equal(model(batch), models[2](batch))
    assert isinstance("".join(longvita.generate(model, processor, [{"role": "user", "content": "words"}], max_new_tokens=3)), str)


def test_damaged_checkpoint_is_skipped_with_a_reason(run, models):
    weights = run / "checkpoints" / "step-000002" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.warns(UserWarning, match="skipped .*step-000002: model.safetensors does not match its SHA-256"):
        model, _ = longvita.load(run)
    assert same(model, models[1])
    (run / "checkpoints" / "step-000001" / "MANIFEST.json").unlink()
    whole = "no checkpoint .* is whole: step-000002: .*; step-000001: .*is missing"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=whole):
        longvita.load(run)


def test_plain_directory(plain, models):
    model, _ = longvita.load(str(plain))
    assert same(model, models[1]) and model.dtype == torch.float32
    model, _ = longvita.load(plain, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.head_weight, models[1].head_weight.bfloat16())


def test_what_is_missing_is_named(plain, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        longvita.load(tmp_path / "nowhere")
    (plain / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor checkpoints/step-.*saved a checkpoint yet"):
        longvita.load(plain)
    (plain / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        longvita.load(plain)
    (plain / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        longvita.load(plain)
    (plain / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        longvita.load(plain)


def test_weights_of_another_model_are_refused(plain, models):
    other = dataclasses.replace(models[1].config, text=dataclasses.replace(models[1].config.text, num_layers=5))
    other.save(plain / "config.json")
    with pytest.raises(ValueError, match="missing model.layers.4.input_layernorm.weight.*Does config.json belong"):
        longvita.load(plain)
