"""Finding run directories: a run itself, or the folder that holds the stages of one (as the demo leaves them)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from longvita.cli.errors import UsageError


def natural_key(path: Path) -> list[int | str]:
    """stage2 before stage10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def stages_of(path: str | os.PathLike[str], file: str) -> list[Path]:
    """[path] when it holds `file`; otherwise its subfolders that do, in natural order. UsageError when there is neither."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory: expected a run directory, or the --out directory of longvita demo")
    if (path / file).is_file():
        return [path]
    found = sorted((folder for folder in path.iterdir() if (folder / file).is_file()), key=natural_key)
    if not found:
        raise UsageError(f"{path} is no run directory: neither it nor a folder in it has a {file}; train first, for example: longvita demo")
    return found


def last_stage(path: str | os.PathLike[str]) -> Path:
    """The run whose model is meant: the directory itself, or the last of the stages in it."""
    return stages_of(path, "config.json")[-1]
