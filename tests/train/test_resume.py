"""Checkpoints that are whole or not there, and resumption that changes no bit: crashes, kill -9, Ctrl-C, full disks, flipped bits."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from longvita.data.schema import DataError
from longvita.model import checkpoint_io
from longvita.model.checkpoint_io import newest_valid_checkpoint
from longvita.train import checkpoint
from longvita.train.checkpoint import SaveError
from longvita.train.metrics import read_metrics
from tests.train.support import Rows, assert_same_bits, make_model, make_row, make_trainer, weights

ROOT = Path(__file__).parents[2]
MEASURED = ("tokens_per_second", "peak_rss_bytes", "seconds")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # as in the killed processes


class Crash(Exception):
    pass


def crash_at(step):
    def on_step(now, row):
        if now == step:
            raise Crash

    return on_step


def optimizer_tensors(trainer):
    return dict(checkpoint._optimizer_tensors(trainer.model, trainer.optimizers))


def learned(run_dir):
    """What must not depend on interruptions: rows without measured times."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in read_metrics(run_dir / "metrics.jsonl")]


# ---- the same bits ----


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon", "dtype": "bfloat16", "trainable": ("projector", "text")}])
def test_twenty_steps_are_ten_and_a_crash_and_ten(tmp_path, options):
    whole = make_trainer(tmp_path / "whole", steps=20, checkpoint_every=10, **options)
    whole.train()
    with pytest.raises(Crash):
        make_trainer(tmp_path / "cut", steps=20, checkpoint_every=10, on_step=crash_at(13), **options).train()
    assert read_metrics(tmp_path / "cut" / "metrics.jsonl")[-1]["step"] == 13
    resumed = make_trainer(tmp_path / "cut", model=make_model(seed=99), steps=20, checkpoint_every=10, **options)
    assert resumed.step == 10 and resumed.loader.position == whole.loader.rows.index(whole.loader.rows[20 % 7])
    summary = resumed.train()
    assert_same_bits(weights(whole.model), weights(resumed.model))
    assert_same_bits(optimizer_tensors(whole), optimizer_tensors(resumed))
    assert learned(tmp_path / "whole") == learned(tmp_path / "cut")
    assert summary["steps"] == 20 and summary["tokens"] == whole.summary()["tokens"] and resumed.tokens == whole.tokens
    names = ["model.safetensors", "optimizer/shard-00001-model-00001-of-00001.safetensors"]
    for name in names:
        files = [tmp_path / run / "checkpoints" / "step-000020" / name for run in ("whole", "cut")]
        assert_same_bits(*map(load_file, files))


def run_program(run_dir, *, kill_after=0, steps=20, checkpoint_every=10):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_AFTER": str(kill_after)}
    command = [sys.executable, "-m", "tests.train.support", str(run_dir), str(steps), str(checkpoint_every)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_kill_nine_and_the_same_command(tmp_path):
    killed = run_program(tmp_path / "cut", kill_after=13)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout.split() == [str(step) for step in range(1, 14)]
    resumed = run_program(tmp_path / "cut")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split() == [str(step) for step in range(11, 21)]
    whole = make_trainer(tmp_path / "whole", steps=20, checkpoint_every=10, optimizer="muon")
    whole.train()
    assert learned(tmp_path / "whole") == learned(tmp_path / "cut")
    assert_same_bits(load_file(tmp_path / "cut/checkpoints/step-000020/model.safetensors"), weights(whole.model))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = make_trainer(tmp_path, steps=3)
    summary = first.train()
    again = make_trainer(tmp_path, model=make_model(5), steps=3, on_step=crash_at(1))
    assert again.train() == summary
    assert_same_bits(weights(first.model), weights(again.model))


def test_random_states_are_part_of_it(tmp_path):
    def draw():
        return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    np.random.randn()  # leaves half of a pair behind
    state = json.loads(json.dumps(checkpoint.random_state()))
    expected = draw()
    draw()
    checkpoint.set_random_state(state)
    assert draw() == expected
    seen = {}
    make_trainer(tmp_path / "a", steps=4, on_step=lambda step, row: seen.setdefault(step, draw())).train()
    with pytest.raises(Crash):
        make_trainer(tmp_path / "b", steps=4, checkpoint_every=2, on_step=lambda step, row: draw() and crash_at(3)(step, row)).train()
    resumed = {}
    make_trainer(tmp_path / "b", steps=4, checkpoint_every=2, on_step=lambda step, row: resumed.setdefault(step, draw())).train()
    assert resumed == {3: seen[3], 4: seen[4]}


# ---- Ctrl-C ----


def test_interrupt_finishes_the_step_and_saves(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    interrupt = lambda step, row: step == 3 and signal.raise_signal(signal.SIGINT)  # noqa: E731
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 3 of 9; saved .*step-000003; run the same command again"):
        make_trainer(tmp_path / "cut", steps=9, on_step=interrupt).train()
    assert signal.getsignal(signal.SIGINT) is before
    resumed, whole = make_trainer(tmp_path / "cut", steps=9), make_trainer(tmp_path / "whole", steps=9)
    assert resumed.step == 3
    resumed.train()
    whole.train()
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert learned(tmp_path / "whole") == learned(tmp_path / "cut")


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_interrupt_stops_at_once(tmp_path, before, capfd):
    """Also in a background job of a shell, which begins with the signal ignored."""

    def twice(step, row):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    found = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            make_trainer(tmp_path, steps=9, on_step=twice).train()
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, found)
    assert str(caught.value) == "" and not list(tmp_path.glob("checkpoints/*"))
    assert "stopping after this step, then saving; Ctrl-C again stops at once" in capfd.readouterr().err


def test_interrupt_in_the_last_step_is_a_finished_run(tmp_path):
    summary = make_trainer(tmp_path, steps=2, on_step=lambda step, row: step == 2 and signal.raise_signal(signal.SIGINT)).train()
    assert summary["steps"] == 2


# ---- data that cannot be read ----


class BrokenRows(Rows):
    """Raises where `bad`, counted from 0, would have come."""

    bad = 7

    def __iter__(self):
        for batch in super().__iter__():
            if self.position - 1 == self.bad:
                raise DataError("bad_json", "expected a JSON object", "rows.jsonl:8")
            yield batch


@pytest.mark.parametrize("bad", [6, 7])  # the first row of step 4, and the second, when half of the step is done
def test_an_error_of_the_data_loses_no_step(tmp_path, capsys, bad):
    rows = [make_row(seed) for seed in range(12)]
    whole = make_trainer(tmp_path / "whole", rows=rows, steps=6)
    whole.train()
    cut = make_trainer(tmp_path / "cut", rows=rows, steps=6)
    cut.loader = BrokenRows(rows)
    cut.loader.bad = bad
    with pytest.raises(DataError, match="^rows.jsonl:8: expected a JSON object\n") as caught:  # the note follows
        cut.train()
    assert caught.value.reason == "bad_json" and str(caught.value) == "rows.jsonl:8: expected a JSON object"
    [note] = caught.value.__notes__
    assert "after step 3 of 6; saved" in note and "step-000003" in note and note in capsys.readouterr().err
    assert all(parameter.grad is None for parameter in cut.trained.values())
    path = newest_valid_checkpoint(tmp_path / "cut").path
    assert path.name == "step-000003" and checkpoint_io.read_json(path / "state.json")["data"] == {"position": 6}
    resumed = make_trainer(tmp_path / "cut", rows=rows, model=make_model(9), steps=6)
    assert resumed.step == 3
    resumed.train()
    assert_same_bits(weights(whole.model), weights(resumed.model))
    assert_same_bits(optimizer_tensors(whole), optimizer_tensors(resumed))
    assert learned(tmp_path / "whole") == learned(tmp_path / "cut")


def test_an_error_of_the_data_in_the_first_step_leaves_no_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, steps=2)
    trainer.loader = BrokenRows(trainer.loader.rows)
    trainer.loader.bad = 1
    with pytest.raises(DataError) as caught:
        trainer.train()
    assert not hasattr(caught.value, "__notes__") and not list(tmp_path.glob("checkpoints/*"))


# ---- what is kept ----


def test_at_least_two_checkpoints_are_kept(tmp_path):
    def kept():
        return [path.name for path in checkpoint_io.list_checkpoints(tmp_path)]

    seen = []
    make_trainer(tmp_path, steps=7, checkpoint_every=1, on_step=lambda step, row: seen.append(len(kept()))).train()
    assert kept() == ["step-000006", "step-000007"] and max(seen) == 2
    shutil.rmtree(tmp_path / "checkpoints")
    make_trainer(tmp_path, steps=7, checkpoint_every=1, keep_checkpoints=3).train()
    assert kept() == ["step-000005", "step-000006", "step-000007"]


def test_a_damaged_one_is_skipped_with_its_reason_and_not_counted(tmp_path, capsys):
    make_trainer(tmp_path, steps=8, checkpoint_every=2).train()
    weights_file = tmp_path / "checkpoints/step-000008/model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    trainer = make_trainer(tmp_path, steps=8, checkpoint_every=1, progress="lines")
    assert trainer.step == 6
    trainer.train()
    said = capsys.readouterr().err
    assert "skipped" in said and "step-000008: model.safetensors has" in said and "resumed from" in said and "at step 6 of 8" in said
    assert [path.name for path in checkpoint_io.list_checkpoints(tmp_path)] == ["step-000007", "step-000008"]
    assert newest_valid_checkpoint(tmp_path).skipped == []  # written again


def test_the_same_step_is_not_written_twice(tmp_path):
    trainer = make_trainer(tmp_path, steps=2)
    trainer.train()
    manifest = tmp_path / "checkpoints/step-000002/MANIFEST.json"
    before = manifest.stat().st_mtime_ns
    trainer._save(None)
    assert manifest.stat().st_mtime_ns == before


def test_every_flipped_bit_is_found(tmp_path):
    make_trainer(tmp_path, steps=4, checkpoint_every=2, optimizer="muon").train()
    newest = tmp_path / "checkpoints/step-000004"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"model.safetensors", "state.json", "MANIFEST.json"} and len(files) == 4
    generator = random.Random(0)
    for path in files:
        content = path.read_bytes()
        positions = {0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(25))}
        for position in positions:
            damaged = bytearray(content)
            damaged[position] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            found = newest_valid_checkpoint(tmp_path)
            assert found.path.name == "step-000002", (path.name, position)
            assert found.skipped[0][0] == newest and found.skipped[0][1]
        path.write_bytes(content)
    assert newest_valid_checkpoint(tmp_path).path == newest


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    make_trainer(tmp_path, steps=1).train()
    names = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}


# ---- another configuration ----


def test_a_changed_configuration_is_named(tmp_path):
    make_trainer(tmp_path, steps=2).train()
    with pytest.raises(ValueError, match=r"step-000002 was written with another configuration \(recipe.lr: 0.001 then, 0.002 now\)"):
        make_trainer(tmp_path, steps=2, lr=2e-3)
    with pytest.raises(ValueError, match="recipe.steps: 2 then, 3 now.*recipe.clip.*and 1 more.*choose another output directory"):
        make_trainer(tmp_path, steps=3, global_batch=1, clip=2.0, seed=5)
    trainer = make_trainer(tmp_path, steps=2, checkpoint_every=1, log_every=3, recompute=("text",))  # none of these changes a value
    assert trainer.step == 2


def test_configuration_comparison_is_deep(tmp_path):
    saved = {"data": [{"path": "a", "ratio": 1}], "x": {}}
    state = {"config": saved, "config_hash": checkpoint.config_hash(saved)}
    checkpoint.check_config(state, {"x": {}, "data": [{"ratio": 1, "path": "a"}]}, tmp_path)
    for changed, match in (
        ({"data": [{"path": "b", "ratio": 1}], "x": {}}, r"data\[0\].path: a then, b now"),
        ({"data": [{"path": "a", "ratio": 1}, {"path": "c"}], "x": {}}, r"data\[1\].path: absent then, c now"),
        ({"data": None, "x": {}}, r"data: absent then, None now"),
    ):
        with pytest.raises(ValueError, match=match):
            checkpoint.check_config(state, changed, tmp_path)


# ---- disks ----


def assert_failed_save_harms_nothing(run_dir, trainer, match):
    """The save after step 4 fails: step 2 is still the newest, nothing else is there, and training goes on once there is room."""
    with pytest.raises(SaveError, match=match):
        trainer.train()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000002"]
    found = newest_valid_checkpoint(run_dir)
    assert found.path.name == "step-000002" and not found.skipped


MESSAGE = r"step-000004 could not be saved in .*: {} \(.* MiB free\). 1 earlier .* newest is step-000002; .* run the same command"


@pytest.mark.parametrize("failing", range(8))
def test_a_full_disk_at_any_file(tmp_path, monkeypatch, failing):
    """The n-th attempt to force a file of the second checkpoint to the disk finds it full."""
    real, calls = os.fsync, []

    def fsync(descriptor):
        if any((tmp_path / "checkpoints").glob(".saving-step-000004")):
            calls.append(descriptor)
            if len(calls) == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert_failed_save_harms_nothing(tmp_path, make_trainer(tmp_path, steps=4, checkpoint_every=2), MESSAGE.format("the disk is full"))
    monkeypatch.undo()
    resumed, whole = make_trainer(tmp_path, steps=4, checkpoint_every=2), make_trainer(tmp_path / "whole", steps=4)
    resumed.train()
    whole.train()
    assert_same_bits(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("writer", ["save_weights", "write_manifest"])
def test_a_write_that_stops_half_way(tmp_path, monkeypatch, writer):
    real = getattr(checkpoint_io, writer)

    def half(*args):
        real(*args)
        target = tmp_path / "checkpoints/.saving-step-000004"
        if target.exists():
            file = target / ("model.safetensors" if writer == "save_weights" else "MANIFEST.json")
            os.truncate(file, file.stat().st_size // 2)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_io, writer, half)
    assert_failed_save_harms_nothing(tmp_path, make_trainer(tmp_path, steps=4, checkpoint_every=2), MESSAGE.format("the disk is full"))


@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_the_system_itself_refuses_to_write(tmp_path, room):
    """A real limit of the operating system on file sizes: optimizer, weights or state end in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def narrow(step, row):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    trainer = make_trainer(tmp_path, steps=4, checkpoint_every=2, on_step=narrow)
    try:
        assert_failed_save_harms_nothing(tmp_path, trainer, MESSAGE.format("[^(]*File too large[^(]*"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_first_save_on_a_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_io, "save_weights", full)
    with pytest.raises(SaveError, match="step-000002 could not be saved .* there is no earlier checkpoint"):
        make_trainer(tmp_path, steps=2).train()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_what_a_killed_save_left_is_cleared_and_never_read(tmp_path):
    debris = [tmp_path / "checkpoints" / name for name in (".saving-step-000009", ".removing-step-000001", "step-000007")]
    for folder in debris:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    trainer = make_trainer(tmp_path, steps=2)
    assert trainer.step == 0
    trainer.train()
    assert not debris[0].exists() and not debris[1].exists() and newest_valid_checkpoint(tmp_path).path.name == "step-000002"


def run_kills(run_dir, count, seed):
    command = [sys.executable, "-m", "tests.train.kills", str(run_dir), str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_kills_at_random_moments_of_a_save(tmp_path):
    result = run_kills(tmp_path, 25, seed=0)
    assert result["kills"] == 25 and result["saved"] >= 25 and result["mid_save"] >= 5, result


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    result = run_kills(tmp_path, 200, seed=1)
    assert result["kills"] == 200 and result["mid_save"] >= 50, result
