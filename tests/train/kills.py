"""Kills a process that saves checkpoints at random moments and looks at what is left.

    python -m tests.train.kills RUN_DIR COUNT SEED

A child saves one checkpoint after the other and reports each finished one through a pipe; the parent kills it with SIGKILL and checks: the
newest valid checkpoint is at least the last one reported, nothing visible is partial, two are complete once two were. Prints one JSON line.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from longvita.model.checkpoint_io import list_checkpoints, newest_valid_checkpoint, verify
from tests.train.support import make_trainer


def save_forever(trainer, step: int, pipe: int) -> None:
    while True:
        step += 1
        trainer.step = step
        trainer._save(None)
        os.write(pipe, b"%d\n" % step)


def kill_once(trainer, newest: int, delay: float) -> int:
    """Forks, kills after the first save and `delay` seconds, returns the last step reported."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        save_forever(trainer, newest, writable)
    os.close(writable)
    with os.fdopen(readable, "rb") as reports:
        first = int(reports.readline())
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return max([first, *map(int, reports.read().split())])


def main(run_dir: str, count: str, seed: str) -> None:
    run_dir, generator = Path(run_dir), random.Random(int(seed))
    trainer = make_trainer(run_dir, steps=1, optimizer="muon")
    trainer.train()
    newest, saved, mid_save = 1, 0, 0
    for _ in range(int(count)):
        reported = kill_once(trainer, newest, generator.uniform(0, 0.06))
        found = newest_valid_checkpoint(run_dir)
        newest_before, newest = newest, int(found.path.name.removeprefix("step-"))
        assert newest >= reported, f"step {reported} was saved, {newest} is the newest left"
        assert not found.skipped, f"partial: {found.skipped}"
        complete = list_checkpoints(run_dir)
        assert len(complete) >= 2, f"only {complete} left"
        for path in complete:
            verify(path)
        saved += newest - newest_before
        mid_save += any((run_dir / "checkpoints").glob(".saving-*"))
    print(json.dumps({"kills": int(count), "saved": saved, "mid_save": mid_save}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
