"""Reading and writing checkpoint directories so that a torn one is never taken for a whole one.

A checkpoint is a directory with a MANIFEST.json that lists size and SHA-256 of every other file and is written last:
{"files": {"model.safetensors": {"bytes": 3914496, "sha256": "…"}, …}}. A run keeps them as `checkpoints/step-000100`.

    found = newest_valid_checkpoint("runs/stage1")      # found.path, and found.skipped: [(directory, why not)]
    load_weights(model, found.path / "model.safetensors")

Nothing here is a pickle.
"""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

MANIFEST = "MANIFEST.json"
WEIGHTS = "model.safetensors"
_STEP = re.compile(r"step-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


class FoundCheckpoint(NamedTuple):
    path: Path | None
    skipped: list[tuple[Path, str]]


# ---- small files that are either old or new, never half ----


def fsync_directory(path: str | os.PathLike) -> None:
    """Makes renames inside this directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: str | os.PathLike) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Replaces `path` by `data`: readers, and a crash at any moment, see the old file or the new one. A failure leaves nothing behind."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 is not what other files of a run have
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def atomic_write_json(path: str | os.PathLike, value) -> None:
    """`atomic_write_bytes` of readable JSON; NaN and infinity are refused because JSON has none."""
    atomic_write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object from a file. CheckpointError if it is missing or anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


# ---- manifests ----


def sha256(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files(directory: Path) -> dict[str, Path]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in paths if path != directory / MANIFEST}


def write_manifest(directory: str | os.PathLike) -> None:
    """Fsyncs every file under `directory`, then writes the manifest that makes it a checkpoint."""
    directory = Path(directory)
    entries = {}
    for name, path in _files(directory).items():
        fsync_file(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for folder in {path.parent for path in _files(directory).values()}:
        fsync_directory(folder)
    atomic_write_json(directory / MANIFEST, {"files": entries})


def verify(directory: str | os.PathLike) -> None:
    """CheckpointError that says what is wrong unless every file named in the manifest is there, whole and unchanged."""
    directory = Path(directory)
    entries = read_json(directory / MANIFEST).get("files")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{directory / MANIFEST} lists no files")
    for name, entry in entries.items():
        path = directory / name
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise CheckpointError(f"{directory / MANIFEST}: the entry for {name} needs bytes and sha256")
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes, the manifest says {entry['bytes']}")
    for name, entry in entries.items():  # sizes first: a torn file is found without reading the others
        if sha256(directory / name) != entry["sha256"]:
            raise CheckpointError(f"{name} does not match its SHA-256: its content changed after it was saved")


def list_checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """`checkpoints/step-*` of a run, oldest first; temporary directories are not among them."""
    folder = Path(run_dir) / "checkpoints"
    steps = [(int(match[1]), path) for path in folder.glob("step-*") if path.is_dir() and (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(steps)]


def newest_valid_checkpoint(run_dir: str | os.PathLike) -> FoundCheckpoint:
    """The newest checkpoint that verifies (path None if there is none), and the newer ones that do not, each with its reason."""
    skipped = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify(path)
        except (CheckpointError, OSError) as error:
            skipped.append((path, str(error)))
        else:
            return FoundCheckpoint(path, skipped)
    return FoundCheckpoint(None, skipped)


# ---- weights ----


def save_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Every parameter under its published name as safetensors."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, os.fspath(path), metadata={"format": "pt"})


def load_weights(model: nn.Module, path: str | os.PathLike, *, device=None, dtype: torch.dtype | None = None) -> None:
    """Fills every parameter from a safetensors file, in the file's dtype unless another is asked for.

    The names and shapes must match exactly: CheckpointError lists what is missing, left over, or of another shape.
    The parameters are replaced, so a model on the meta device comes to life.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with safe_open(os.fspath(path), framework="pt", device=str(device or "cpu")) as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            _check_names(path, expected, stored)
            tensors = {name: file.get_tensor(name) for name in expected}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])


def _check_names(path, expected: dict[str, tuple], stored: dict[str, tuple]) -> None:
    problems = [f"missing {name}" for name in expected if name not in stored]
    problems += [f"unknown {name}" for name in stored if name not in expected]
    problems += [f"{n} has shape {stored[n]}, the model {s}" for n, s in expected.items() if n in stored and stored[n] != s]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path} does not hold this model's weights: {'; '.join(problems[:5])}{more}. Does config.json belong to them?"
        )
