"""Two gloo processes against one: gradients, weights, counts, checkpoints, the guard and the rounding of the global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvita.model.checkpoint_io import newest_valid_checkpoint
from longvita.train import parallel
from longvita.train.metrics import read_metrics
from tests.train.support import assert_close, make_model, make_row, make_trainer, weights

ROOT = Path(__file__).parents[2]
# Supervised tokens differ between the ranks' rows, and one rank has a row with none: only a global count gives the right mean.
ROWS = [make_row(seed, supervised=supervised) for seed, supervised in enumerate((30, 2, 0, 12, 1, 25, 7, 7))]
OPTIONS = {"global_batch": 4, "steps": 4, "checkpoint_every": 2, "clip": 1e9, "lr": 1e-4}


def gradients_at(step, into):
    def on_step(now, row):
        if now == step:
            into.update({name: p.grad.clone() for name, p in on_step.trainer.trained.items()})

    return on_step


def train(run_dir, model=None, **options):
    """(trainer, gradients of the first step)."""
    grads = {}
    on_step = gradients_at(1, grads)
    trainer = on_step.trainer = make_trainer(run_dir, rows=ROWS, model=model, on_step=on_step, **{**OPTIONS, **options})
    trainer.train()
    return trainer, grads


def test_without_a_group_everything_is_the_identity():
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    assert parallel.gather("x") == ["x"] and parallel.sum_numbers([1.0, 2.0], torch.device("cpu")) == [1.0, 2.0]
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    parallel.sum_gradients([parameter])
    parallel.broadcast_parameters([parameter])
    parallel.barrier()
    assert torch.equal(parameter.grad, torch.ones(2))


def test_several_ranks_keep_their_number_of_threads(tmp_path, monkeypatch):
    """Each updates its own copy of the weights, and with other numbers of threads the bits would differ."""
    for world_size, kept in ((1, True), (2, False)):
        monkeypatch.setattr(parallel, "world_size", lambda count=world_size: count)
        trainer = make_trainer(tmp_path / str(world_size), rows=ROWS, threads=object(), **OPTIONS)
        assert (trainer.threads is not None) == kept


@pytest.mark.dist
def test_two_processes_equal_one(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.test_data_parallel", str(tmp_path), str(rank)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][1] + said[1][1]

    torch.set_num_threads(1)
    one, grads = train(tmp_path / "one")
    for rank in range(2):
        assert_close(load_file(tmp_path / f"grads{rank}.safetensors"), grads)
    two = newest_valid_checkpoint(tmp_path / "two").path
    assert_close(load_file(two / "model.safetensors"), weights(one.model), 1e-5)
    rows, expected = read_metrics(tmp_path / "two/metrics.jsonl"), read_metrics(tmp_path / "one/metrics.jsonl")
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        for key in ("step", "tokens", "supervised_tokens", "fill_rate", "lr"):
            assert row[key] == other[key]

    # Two ranks wrote it, one goes on with it: every rank walks the same order of rows.
    state = json.loads((two.parent / "step-000002/state.json").read_text())
    assert len(state["random"]) == 2 and state["data"] == {"position": 8}
    (two / "MANIFEST.json").unlink()
    resumed = make_trainer(tmp_path / "two", model=make_model(7), rows=ROWS, **OPTIONS)
    assert resumed.step == 2
    resumed.train()
    assert_close(weights(resumed.model), weights(one.model), 1e-5)

    guard = read_metrics(tmp_path / "guard/metrics.jsonl")
    assert [row["skipped"] for row in guard] == ["non-finite", None]
    assert "step 1, rank 1: the gradient is not finite, first bad parameter: lm_head.weight" in said[0][1]
    assert "global batch 3 is no multiple of 2 data-parallel ranks: training with 4 rows per step, 2 per rank" in said[0][1]
    assert said[1][1] == ""  # one rank speaks for all


def main(folder: str, rank: str) -> None:
    """One of the two processes."""
    folder, rank = Path(folder), int(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    _, grads = train(folder / "two", make_model(seed=rank))  # rank 0's weights go to everyone
    save_file({name: grad.contiguous() for name, grad in grads.items()}, folder / f"grads{rank}.safetensors")
    model, first = make_model(), [True]

    def poison(grad):
        bad = rank == 1 and first.pop() if first else False
        return grad * float("nan") if bad else grad

    model.head_weight.register_hook(poison)
    make_trainer(folder / "guard", model=model, rows=ROWS[3:], global_batch=3, steps=2, progress="lines").train()
    torch.distributed.barrier()  # gloo aborts now and then when a peer leaves while its threads still run
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # and now and then all the same, in the interpreter's exit, when everything that is looked at here is done


if __name__ == "__main__":
    main(*sys.argv[1:])
