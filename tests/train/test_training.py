"""The trainer with everything real: the tiny model on native ops and on references, packed data with media, four stages in a row."""

import dataclasses

import numpy as np
import pytest
import torch

import longvita
from longvita.data.loader import PackedLoader
from longvita.data.processor import Processor
from longvita.data.template import ChatTokenizer
from longvita.model.checkpoint_io import load_weights, newest_valid_checkpoint
from longvita.model.long_vita import LongVita
from longvita.train.metrics import read_metrics
from longvita.train.recipes import STAGES
from longvita.train.trainer import Trainer
from longvita_kernels import backends, native
from tests.train.support import assert_same_bits, weights

LENGTH = 192


def samples(count: int) -> list:
    """Questions about a coloured image, a three-frame video, or text alone."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        number = int(rng.integers(10))
        pixels = np.full((32, 32, 3), 25 * number, dtype=np.uint8)
        media = [
            {"type": "image", "image": pixels},
            {"type": "video", "video": np.stack([pixels] * 3)},
            {"type": "text", "text": f"The number is {number}. "},
        ][i % 3]
        question = [media, {"type": "text", "text": "Which number?"}]
        rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {number}."}])
    return rows


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer.train_bpe(["The number is 7. Which number? It is 7."] * 4, vocab_size=512)


@pytest.fixture(scope="module")
def config(tokenizer):
    return dataclasses.replace(longvita.presets["tiny"], tokens=tokenizer.token_ids)


def make_trainer(run_dir, stage, config, tokenizer, model=None, on_step=None, prefetch=0, **overrides):
    small = {"sequence_length": LENGTH, "global_batch": 2, "steps": 3, "lr": 1e-3, "dtype": "float32"}
    recipe = STAGES[stage](**{**small, **overrides})
    options = {"reset": recipe.reset, "seed": recipe.seed, "max_frames": recipe.max_frames, "prefetch": prefetch}
    loader = PackedLoader(samples(30), Processor(config, tokenizer), LENGTH, **options)
    model = LongVita(config).init_weights(0) if model is None else model
    return Trainer(model, loader, recipe, run_dir, config=config, tokenizer=tokenizer, progress="quiet", on_step=on_step)


def test_kernels_do_not_change_training(tmp_path, config, tokenizer):
    """32 steps of everything in float32: the loss at every step within rtol 2e-5, native ops against references."""
    assert native.load() is not None, native.why_missing()
    losses = {}
    for backend in ("native", "reference"):
        with backends.use(backend):
            make_trainer(tmp_path / backend, 2, config, tokenizer, steps=32, global_batch=1, checkpoint_every=100).train()
        losses[backend] = torch.tensor([row["loss"] for row in read_metrics(tmp_path / backend / "metrics.jsonl")], dtype=torch.float64)
    assert losses["native"].shape == (32,) and losses["native"][-1] < losses["native"][0] - 0.5
    torch.testing.assert_close(losses["native"], losses["reference"], rtol=2e-5, atol=0)


def test_resume_with_packed_media(tmp_path, config, tokenizer):
    """The real loader, with a thread that reads ahead, in the middle of an epoch."""

    class Crash(Exception):
        pass

    def crash(step, row):
        if step == 5:
            raise Crash

    options = {"steps": 7, "checkpoint_every": 3, "trainable": ("projector", "text"), "prefetch": 1}
    whole = make_trainer(tmp_path / "whole", 2, config, tokenizer, **options)
    whole.train()
    with pytest.raises(Crash):
        make_trainer(tmp_path / "cut", 2, config, tokenizer, on_step=crash, **options).train()
    resumed = make_trainer(tmp_path / "cut", 2, config, tokenizer, **options)
    assert resumed.step == 3
    resumed.train()
    assert_same_bits(weights(whole.model), weights(resumed.model))
    assert resumed.loader.state_dict() == whole.loader.state_dict()
    assert [row["tokens"] for row in read_metrics(tmp_path / "cut/metrics.jsonl")] == [
        row["tokens"] for row in read_metrics(tmp_path / "whole/metrics.jsonl")
    ]


def test_four_stages_in_a_row(tmp_path, config, tokenizer):
    """Each stage starts from the weights of the one before; what it freezes does not move; the last one answers."""
    model, before = LongVita(config).init_weights(0), None
    for stage in STAGES:
        run = tmp_path / f"stage{stage}"
        if before:
            load_weights(model, newest_valid_checkpoint(before).path / "model.safetensors")
        start = weights(model)
        dtype = "bfloat16" if stage == 4 else "float32"
        trainer = make_trainer(run, stage, config, tokenizer, model=model, dtype=dtype, optimizer="muon", muon_lr=0.01)
        summary = trainer.train()
        moved = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
        allowed = {name for part in trainer.recipe.trainable for name in model.part(part)}
        assert moved and moved <= allowed
        assert summary["fill_rate"] > 0.5 and summary["dropped"] == {} and summary["supervised_tokens"] > 0
        before = run
    loaded, processor = longvita.load(before)
    assert_same_bits(weights(loaded), weights(model))
    text = "".join(longvita.generate(loaded, processor, samples(1)[0][:1], max_new_tokens=3))
    assert isinstance(text, str)


def test_a_sequence_too_short_for_the_data_says_so(tmp_path, config, tokenizer):
    recipe = STAGES[1](sequence_length=8, global_batch=1, steps=1, lr=1e-3)
    loader = PackedLoader(samples(6), Processor(config, tokenizer), 8, reset=True, seed=0)
    with pytest.raises(ValueError, match="dropped.*too_long: 6"):
        Trainer(LongVita(config).init_weights(0), loader, recipe, tmp_path, config=config, progress="quiet").train()
