"""The step loop: accumulate packed rows, divide by the global number of supervised tokens, clip, guard, update, report, save.

    trainer = Trainer(model, loader, stage1(steps=200, …), "runs/stage1", config=config, tokenizer=tokenizer)
    summary = trainer.train()      # the same lines, run again, resume from the newest valid checkpoint, bit for bit

On a CPU "bit for bit" needs the same number of threads in both runs (see longvita/threads.py); metrics.jsonl has it for every step.

A run directory holds config.json, tokenizer.json, metrics.jsonl and checkpoints/step-*.

`loader` is an iterable of packed rows (`Batch`) that also has `state_dict()`, `load_state_dict()` and `stats.dropped`; after its last row
it is iterated again, for the next epoch. `model` is a `LongVita`, or has its `loss`, `set_trainable`, `part` and `set_recompute`.
"""

from __future__ import annotations

import fcntl
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from longvita.config import LongVitaConfig
from longvita.model.checkpoint_io import atomic_write_json
from longvita.threads import AdaptiveThreads
from longvita.train import checkpoint, optim, parallel
from longvita.train.metrics import PROGRESS, MetricsLog, Progress, peak_rss_bytes, read_metrics, summarize
from longvita.train.recipes import FREE_FIELDS, Recipe


class NonFiniteError(RuntimeError):
    """Loss or gradients stayed infinite or NaN for too many steps in a row. The weights are those of the last good step."""


class _DataFailed(Exception):
    """The loader raised on this rank or another; `error` is what goes to the caller."""

    def __init__(self, error: Exception):
        self.error = error


class Trainer:
    """One training stage in one run directory.

    Construction freezes what the recipe does not train, builds the optimizers and, if the directory holds a valid checkpoint, restores
    weights, optimizer states, data position and random states from it; otherwise it seeds Python's, NumPy's and torch's generators.
    ValueError if that checkpoint was written with another configuration.

    model      float32; changed in place
    config     describes the model; stored in config.json, so that `longvita.load(run_dir)` needs nothing else
    tokenizer  anything with `save(path)`; stored as tokenizer.json
    progress   "auto" (a bar on a terminal, lines elsewhere), "bar", "lines" or "quiet"
    on_step    called as on_step(step, row) after every step with the row of metrics.jsonl
    data       JSON-ready description of the data, part of the configuration that a resumption must match
    threads    adapts the number of threads when other programs take cores; ignored on a GPU and with several ranks
    """

    def __init__(
        self, model: nn.Module, loader, recipe: Recipe, run_dir, *, config: LongVitaConfig, tokenizer=None, progress: str = "auto",
        on_step: Callable[[int, dict], None] | None = None, data: dict | list | None = None, threads: AdaptiveThreads | None = None,
    ):  # fmt: skip
        if progress not in PROGRESS:
            raise ValueError(f"progress: expected one of {', '.join(PROGRESS)}; got {progress!r}")
        self.model, self.loader, self.recipe, self.config = model, loader, recipe, config
        self.run_dir, self.tokenizer, self.progress, self.on_step = Path(run_dir), tokenizer, progress, on_step
        self.device = next(model.parameters()).device
        # Every rank updates its own copy of the weights: with different numbers of threads the copies would drift apart.
        self.threads = threads if self.device.type == "cpu" and parallel.world_size() == 1 else None
        self.rows, self._rounding = recipe.rows_per_rank(parallel.world_size())
        if getattr(loader, "world_size", 1) != 1:
            raise ValueError("give every rank a loader of the whole data (rank=0, world_size=1): the trainer deals the rows to the ranks")
        self.step = self.tokens = 0
        self._bad_in_a_row = 0
        model.set_recompute(recipe.recompute)
        parts = optim.trained_parts(model, recipe)
        trained = {id(parameter) for named in parts.values() for parameter in named.values()}
        self.trained = {name: p for name, p in model.named_parameters() if id(p) in trained}  # in model order
        self.optimizers = optim.build_optimizers(parts, recipe, config.vision.num_layers)
        self.run_config = self._describe(data)
        self._notes = [self._rounding] if self._rounding else []
        self._restore()
        self._position = loader.state_dict()  # as of the last whole step
        self._stream = self._packed_rows()

    # ---- the run ----

    def train(self) -> dict:
        """Trains to the recipe's last step and returns the run's totals (see metrics.summarize), over interruptions too.

        Ctrl-C finishes the step, saves and raises KeyboardInterrupt saying so; a second one stops at once. RuntimeError when a checkpoint
        cannot be saved or the loss stays non-finite. An error of the loader arrives as it is, after the last whole step was saved.
        """
        recipe, main = self.recipe, parallel.rank() == 0
        with ExitStack() as stack:
            log = None
            if main:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_writer(self.run_dir))
                self._write_description()
                log = MetricsLog(self.run_dir / "metrics.jsonl", self.step)
                stack.callback(log.close)
            progress = Progress(self.progress if main else "quiet", recipe.name, self.step, recipe.steps, recipe.log_every)
            stack.callback(progress.close)
            for note in self._notes:
                progress.note(note)
            stack.callback(self._close_stream)
            stopped = stack.enter_context(_interrupt_flag())
            self.model.train()
            while self.step < recipe.steps:
                try:
                    row, problem = self._train_step()
                except _DataFailed as failed:
                    self._save_after(failed.error, log, progress)
                    raise failed.error from failed.error.__cause__
                if log:
                    log.write(row)
                progress.update(row)
                self._guard(problem, progress)
                if self.on_step is not None:
                    self.on_step(self.step, row)
                change = self.threads.adapt() if self.threads is not None else None
                if change:
                    progress.note(f"{change} from step {self.step + 1}")
                stop = parallel.sum_numbers([float(stopped.is_set())], self.device)[0] > 0
                if stop or self.step == recipe.steps or self.step % recipe.checkpoint_every == 0:
                    saved = self._save(log)
                if stop and self.step < recipe.steps:
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step} of {recipe.steps}; saved {saved}; run the same command again to resume there"
                    )
        return self.summary()

    def summary(self) -> dict:
        """Totals of the run so far, read from metrics.jsonl."""
        return summarize(read_metrics(self.run_dir / "metrics.jsonl"))

    # ---- one step ----

    def _train_step(self) -> tuple[dict, str | None]:
        """One step: its row of metrics.jsonl, and what was not finite, or None."""
        started = time.perf_counter()
        optim.set_lr(self.optimizers, self.recipe.lr_factor(self.step + 1))
        loss, norm, supervised, tokens, problem = self._gradients()
        self.step += 1
        self.tokens += tokens
        self._position = self.loader.state_dict()
        if supervised and problem is None:
            for optimizer in self.optimizers:
                optimizer.step()
        seconds = time.perf_counter() - started
        room = self.rows * parallel.world_size() * self.recipe.sequence_length
        row = {
            "step": self.step,
            "loss": loss if math.isfinite(loss) else None,
            "lr": self.recipe.lr * self.recipe.lr_factor(self.step),
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_second": tokens / seconds,
            "fill_rate": tokens / room,
            "dropped": dict(self.loader.stats.dropped),
            "peak_rss_bytes": peak_rss_bytes(),
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "skipped": "non-finite" if problem else None if supervised else "nothing supervised",
        }
        return row, problem

    def _guard(self, problem: str | None, progress: Progress) -> None:
        """Reports a step that was not finite; NonFiniteError after `max_bad_steps` in a row."""
        if problem is None:
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        allowed = self.recipe.max_bad_steps
        message = f"step {self.step}, {problem}; no optimizer step taken ({self._bad_in_a_row} in a row, stopping at {allowed})"
        if parallel.rank() == 0:
            progress.warn(message)
        if self._bad_in_a_row >= allowed:
            raise NonFiniteError(
                f"{message}. The weights are still those of the last good step. Lower the learning rate or look at the data of these "
                f"steps; running the same command resumes from the newest checkpoint in {self.run_dir / 'checkpoints'}"
            )

    def _gradients(self) -> tuple[float, float, int, int, str | None]:
        """Accumulates one step's gradients, averaged and clipped, into `.grad`.

        Returns loss, gradient norm before clipping, supervised tokens, tokens (all over every rank), and what is not finite, or None.
        """
        parameters = list(self.trained.values())
        for parameter in parameters:
            if parameter.grad is None:  # a part no row of this step touches has gradient 0, not none: the same on every rank
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters]
        torch._foreach_zero_(grads)
        failure = None
        try:
            loss, weight, supervised, tokens = self._accumulate()
        except _DataFailed as failed:  # told to the other ranks, which else would wait for this one's numbers
            failure, loss, weight, supervised, tokens = failed.error, 0.0, 0.0, 0, 0
        norm = optim.gradient_norm(parameters).item()
        # looked for before ranks are summed: afterwards the culprit is lost
        problem = None if math.isfinite(loss) and math.isfinite(norm) else f"rank {parallel.rank()}: {self._culprit(loss)}"
        sums = parallel.sum_numbers([loss, weight, supervised, tokens, float(problem is not None), float(failure is not None)], self.device)
        if sums[5]:
            self._drop_step(failure)
        loss, weight, supervised, tokens = sums[0], sums[1], round(sums[2]), round(sums[3])
        if sums[4]:
            return loss, math.nan, supervised, tokens, next(text for text in parallel.gather(problem) if text)
        if not supervised:
            return 0.0, 0.0, 0, tokens, None
        if parallel.world_size() > 1:
            parallel.sum_gradients(parameters)
            norm = optim.gradient_norm(parameters).item()
            if not math.isfinite(norm):
                return loss / weight, norm, supervised, tokens, f"sum over ranks: {self._culprit(loss)}"
        norm /= weight
        torch._foreach_mul_(grads, min(1.0, self.recipe.clip / (norm + 1e-6)) / weight)
        return loss / weight, norm, supervised, tokens, None

    def _accumulate(self) -> tuple[float, float, int, int]:
        """Backward of this rank's rows. Returns the undivided loss, its divisor, supervised tokens and tokens.

        "token": sums over supervised tokens and their number. "row": means of rows, and the number of rows that have one.
        """
        loss = weight = 0.0
        supervised = tokens = 0
        for _ in range(self.rows):
            try:
                batch = next(self._stream)
            except Exception as error:  # whatever stops the data: train() saves the last whole step and raises this very error again
                raise _DataFailed(error) from None
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
                loss_sum, count = self.model.loss(batch)
            tokens += batch.num_tokens
            if not count:
                continue
            supervised += count
            if self.recipe.loss_normalisation == "row":
                loss_sum, count = loss_sum / count, 1
            if loss_sum.requires_grad:  # else no part that is trained touches this row: a projector, and a row without an image
                loss_sum.backward()
            loss += loss_sum.item()
            weight += count
        return loss, weight, supervised, tokens

    def _drop_step(self, failure: Exception | None) -> None:
        """Forgets what this step accumulated and raises _DataFailed on every rank, with this rank's own error if it has one."""
        for parameter in self.trained.values():
            parameter.grad = None
        causes = parallel.gather(None if failure is None else str(failure))
        if failure is None:
            failure = ValueError(next(f"rank {rank}: {cause}" for rank, cause in enumerate(causes) if cause is not None))
        raise _DataFailed(failure)

    def _culprit(self, loss: float) -> str:
        what = "gradient" if math.isfinite(loss) else "loss"
        name = optim.first_non_finite(self.trained)
        return f"the {what} is not finite, first bad parameter: {name or 'none, every gradient alone is finite'}"

    def _packed_rows(self):
        """This rank's rows, epoch after epoch: of every `world_size` rows of the loader's order, the one at its rank.

        Every rank walks the whole order, so data positions are equal on all ranks and a run may resume on another number of them.
        """
        empty_passes = 0
        position = 0
        while empty_passes < 2:  # one may be the rest of an epoch that ended exactly at a checkpoint
            empty_passes += 1
            for batch in self.loader:
                empty_passes = 0
                position += 1
                if (position - 1) % parallel.world_size() == parallel.rank():
                    mine = batch
                if position % parallel.world_size() == 0:
                    yield mine
        raise ValueError(
            f"the data gave no packed row of {self.recipe.sequence_length} tokens in a whole pass; "
            f"dropped samples by reason: {dict(self.loader.stats.dropped)}"
        )

    def _close_stream(self) -> None:
        """Ends the loader's iteration, and a thread that may be behind it. The next one goes on where this one stopped."""
        self._stream.close()
        self._stream = self._packed_rows()

    # ---- state ----

    def _describe(self, data) -> dict:
        """Everything a resumed run must share with the interrupted one. Ranks may differ, rows per step may not."""
        recipe = {key: value for key, value in self.recipe.to_dict().items() if key not in FREE_FIELDS}
        recipe["global_batch"] = self.rows * parallel.world_size()
        return {"model": self.config.to_dict(), "recipe": recipe, "data": data}

    def _write_description(self) -> None:
        atomic_write_json(self.run_dir / "config.json", {**self.run_config, "recipe": self.recipe.to_dict()})
        if self.tokenizer is not None:
            unfinished = self.run_dir / ".tokenizer.json"
            self.tokenizer.save(unfinished)
            unfinished.replace(self.run_dir / "tokenizer.json")

    def _save_after(self, error: Exception, log: MetricsLog | None, progress: Progress) -> None:
        """Keeps the steps before an error of the data, and says so."""
        if self.step == 0:
            return  # nothing to lose
        try:
            saved = self._save(log)
            note = f"the data failed after step {self.step} of {self.recipe.steps}; saved {saved}; repair it and run the same command again"
        except checkpoint.SaveError as problem:
            note = str(problem)
        error.add_note(note)
        if parallel.rank() == 0:
            progress.warn(note)

    def _save(self, log: MetricsLog | None) -> Path:
        if log:
            log.sync()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "data": self._position,
            "config_hash": checkpoint.config_hash(self.run_config),
            "config": self.run_config,
        }
        return checkpoint.save_checkpoint(
            self.run_dir, self.step, model=self.model, optimizers=self.optimizers, state=state, keep=self.recipe.keep_checkpoints
        )

    def _restore(self) -> None:
        path, state, skipped = checkpoint.read_newest(self.run_dir)
        self._notes += skipped
        if path is None:
            _seed(self.recipe.seed)
            parallel.broadcast_parameters(self.model.parameters())
            return
        checkpoint.check_config(state, self.run_config, path)
        checkpoint.load_into(path, self.model, self.optimizers)
        self.loader.load_state_dict(state["data"])
        self.step, self.tokens = state["step"], state["tokens"]
        states = state["random"]
        checkpoint.set_random_state(states[parallel.rank() % len(states)])
        self._notes.append(f"{self.recipe.name}: resumed from {path} at step {self.step} of {self.recipe.steps}")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _interrupt_flag():
    """An event that the first Ctrl-C sets instead of raising; the second one raises. Only the main thread receives signals."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number, frame):
        # A shell lets its background jobs ignore Ctrl-C; who sends the signal twice all the same means it.
        signal.signal(signal.SIGINT, previous if callable(previous) else signal.default_int_handler)
        flag.set()
        os.write(2, b"\nstopping after this step, then saving; Ctrl-C again stops at once\n")  # print is not safe in a signal handler

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def only_writer(directory: Path):
    """Holds the directory's lock, or raises ValueError; the system releases it when the process ends, however that happens."""
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is working in {directory}: wait for it, or choose another output directory") from None
        yield
