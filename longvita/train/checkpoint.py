"""Atomic checkpoints and bit-exact resumption.

    RUN/checkpoints/step-000100/
        model.safetensors          every weight, by its Hugging Face name
        optimizer/*.safetensors    torch.distributed.checkpoint in its safetensors layout: each rank writes its share, no pickle anywhere
        state.json                 step, tokens, data position, random states of every rank, the run's configuration and its hash
        MANIFEST.json              size and SHA-256 of every file above; written last

Everything is written into `checkpoints/.saving-…`, forced to the disk and renamed. A kill at any moment leaves either the whole new
checkpoint or none of it, and older ones are removed only after that, never below two.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from longvita.model import checkpoint_io
from longvita.model.checkpoint_io import WEIGHTS, atomic_write_json, fsync_directory, list_checkpoints
from longvita.train import parallel

OPTIMIZER, STATE = "optimizer", "state.json"
_SAVING, _REMOVING = ".saving-", ".removing-"
_SEPARATOR = "::"  # between a parameter's name and a field of its optimizer state
_ABSENT = "absent"


class SaveError(RuntimeError):
    """A checkpoint could not be written. Earlier ones are intact."""


# ---- writing ----


def save_checkpoint(run_dir: Path, step: int, *, model: nn.Module, optimizers: list, state: dict, keep: int = 2) -> Path:
    """Writes checkpoint `step` of a run and prunes older ones down to `keep`. Collective: every rank calls it.

    `state` is JSON-ready; random states are added here. SaveError when the disk is full or cannot be written.
    """
    final = Path(run_dir) / "checkpoints" / f"step-{step:06d}"
    temporary = final.with_name(_SAVING + final.name)
    main = parallel.rank() == 0
    if parallel.gather(main and _is_valid(final))[0]:
        return final  # stopped again before the first step after a resumption
    try:
        _together(lambda: main and _prepare(temporary), final)
        _together(lambda: _save_optimizers(temporary / OPTIMIZER, model, optimizers), final)
        ranks = parallel.gather(random_state())
        _together(lambda: main and _finish(temporary, final, model, {**state, "random": ranks}), final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if main:
        _prune(run_dir, keep)
    return final


def _together(action: Callable, final: Path) -> None:
    """Runs one phase of a save; if it fails on any rank, every rank raises the same SaveError instead of waiting for the others."""
    failure = None
    try:
        action()
    except (OSError, SafetensorError, _checkpoint_exception()) as error:
        failure = error
    causes = [cause for cause in parallel.gather(failure and str(failure)) if cause]
    if causes:
        raise SaveError(_failure_message(final, causes[0])) from failure


def _prepare(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for path in temporary.parent.iterdir():  # what a killed save left
        if path.name.startswith((_SAVING, _REMOVING)):
            shutil.rmtree(path)
    temporary.mkdir()


def _finish(temporary: Path, final: Path, model: nn.Module, state: dict) -> None:
    checkpoint_io.save_weights(model, temporary / WEIGHTS)
    atomic_write_json(temporary / STATE, state)
    checkpoint_io.write_manifest(temporary)
    if final.exists():  # damaged, or save_checkpoint would have kept it
        _remove(final)
    os.rename(temporary, final)
    fsync_directory(final.parent)


def _is_valid(directory: Path) -> bool:
    try:
        checkpoint_io.verify(directory)
    except checkpoint_io.CheckpointError:
        return False
    return True


def _checkpoint_exception() -> type[BaseException]:
    """What torch wraps around every error of a save; the cause stands in its text."""
    from torch.distributed.checkpoint.api import CheckpointException

    return CheckpointException


def _save_optimizers(directory: Path, model: nn.Module, optimizers: list) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    tensors = dict(_optimizer_tensors(model, optimizers))
    if tensors:
        with _quiet_single_process():
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))


def _optimizer_tensors(model: nn.Module, optimizers: list):
    """("parameter::field", tensor) of everything the optimizers remember."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                yield f"{names[parameter]}{_SEPARATOR}{key}", value


@contextmanager
def _quiet_single_process():
    """Without a process group torch warns at every save that it saves from one process; that is what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _remove(directory: Path) -> None:
    """Renames before deleting: a kill in between leaves debris under a name nobody reads, not half a checkpoint."""
    doomed = directory.with_name(_REMOVING + directory.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _prune(run_dir: Path, keep: int) -> None:
    """Removes what is older than the newest `keep` checkpoints that verify. They are read once more here: nothing is removed on trust."""
    valid = 0
    for path in reversed(list_checkpoints(run_dir)):
        if valid == keep:
            _remove(path)
        else:
            valid += _is_valid(path)


def _failure_message(final: Path, cause: str) -> str:
    earlier = [path.name for path in list_checkpoints(final.parent.parent)]
    kept = f"{len(earlier)} earlier checkpoint(s) are intact, the newest is {earlier[-1]}" if earlier else "there is no earlier checkpoint"
    reason = "the disk is full" if "No space left" in cause else cause.strip().splitlines()[-1]
    folder = next(path for path in (final.parent, *final.parents) if path.exists())
    return (
        f"{final.name} could not be saved in {final.parent}: {reason} ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free). {kept}; "
        "nothing of the failed one was left behind. Make room and run the same command again: it resumes there"
    )


# ---- reading ----


def read_newest(run_dir: Path) -> tuple[Path | None, dict, list[str]]:
    """(newest valid checkpoint or None, its state, why newer ones were skipped). Rank 0 looks, every rank gets the answer."""
    found = checkpoint_io.newest_valid_checkpoint(run_dir) if parallel.rank() == 0 else None
    path, skipped = parallel.gather(found and (found.path, [f"skipped {path}: {reason}" for path, reason in found.skipped]))[0]
    return path, checkpoint_io.read_json(path / STATE) if path else {}, skipped


def load_into(checkpoint: Path, model: nn.Module, optimizers: list) -> None:
    """Copies weights and optimizer states into the existing tensors."""
    model.load_state_dict(load_file(checkpoint / WEIGHTS), strict=True)
    _load_optimizers(checkpoint / OPTIMIZER, model, optimizers)


def _load_optimizers(directory: Path, model: nn.Module, optimizers: list) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if not directory.exists():  # saved before the first update
        return
    reader = HuggingFaceStorageReader(str(directory))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in stored.items()}
    with _quiet_single_process():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)))
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, field = key.split(_SEPARATOR)
        by_name.setdefault(name, {})[field] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if fields := by_name.get(names[parameter]):
                optimizer.state[parameter] = {field: tensor.to(parameter.device) for field, tensor in fields.items()}


# ---- random states and the configuration's hash ----


def random_state() -> dict:
    """States of Python's, NumPy's and torch's generators in this process, JSON-ready."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    return {
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "numpy": [name, base64.b64encode(keys.tobytes()).decode(), position, has_gauss, gauss],
        "python": [version, list(internal), next_gauss],
    }


def set_random_state(state: dict) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch"])), dtype=torch.uint8))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.frombuffer(base64.b64decode(keys), dtype=np.uint32), position, has_gauss, gauss))
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))


def config_hash(config: dict) -> str:
    """SHA-256 of a JSON-ready configuration, independent of the order of keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, allow_nan=False).encode()).hexdigest()


def check_config(saved: dict, current: dict, checkpoint: Path) -> None:
    """ValueError naming the first changed field, unless a checkpoint's configuration is the current one. `saved` is its state."""
    if saved["config_hash"] == config_hash(current):
        return
    before, now = _flatten(saved["config"]), _flatten(current)
    changed = [key for key in {**before, **now} if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    listed = "; ".join(f"{key}: {before.get(key, _ABSENT)} then, {now.get(key, _ABSENT)} now" for key in changed[:3])
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise ValueError(
        f"{checkpoint} was written with another configuration ({listed}{more}). "
        "Restore it to resume, or choose another output directory for a new run"
    )


def _flatten(value, path: str = "") -> dict:
    if isinstance(value, dict) and value:
        return {key: leaf for name, inner in value.items() for key, leaf in _flatten(inner, f"{path}.{name}" if path else name).items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {key: leaf for i, inner in enumerate(value) for key, leaf in _flatten(inner, f"{path}[{i}]").items()}
    return {path: value}
