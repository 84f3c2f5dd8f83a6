"""The run-config JSON of `longvita train`: what to train, how, and on what.

    {
      "model": "tiny",                                  a preset, or {"preset": "tiny", "text": {"num_layers": 6}}
      "init": "runs/stage1",                            instead of "model": go on with this run's newest checkpoint and its tokenizer
      "tokenizer": "tokenizer.json",                    optional: default is that of "init", else a small one is trained on the data
      "recipe": {"stage": 2, "steps": 500, "sequence_length": 2048, "global_batch": 4},
      "data": [{"path": "train.jsonl", "ratio": 1.0, "num": 5000}],
      "media_root": "media",                            optional: the folder that images and videos must lie in; default: beside each JSONL
      "window": 256,                                    optional: how many samples packing looks ahead
      "on_error": "strict"                              optional: "skip" counts bad rows and media by reason and goes on without them
    }

Relative paths start at the file's own folder. No torch in here.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longvita.cli.errors import UsageError
from longvita.config import LongVitaConfig, presets
from longvita.train import recipes


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One JSONL file of a mixture: `ratio` scales its rows per epoch, `num` caps them."""

    path: Path
    ratio: float = 1.0
    num: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or self.ratio <= 0:
            raise UsageError(f"data: ratio must be a number above 0, got {self.ratio!r}")
        if self.num is not None and (isinstance(self.num, bool) or not isinstance(self.num, int) or self.num < 1):
            raise UsageError(f"data: num must be a whole number of at least 1, got {self.num!r}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A checked run configuration. `model` is None when it comes from `init`."""

    recipe: recipes.Recipe
    data: tuple[DataSource, ...]
    model: LongVitaConfig | None = None
    init: Path | None = None
    tokenizer: Path | None = None
    media_root: Path | None = None
    window: int = 256
    on_error: str = "strict"

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise UsageError(f"run config: window must be a whole number of at least 1, got {self.window!r}")
        if self.on_error not in ("strict", "skip"):
            raise UsageError(
                f"run config: on_error must be 'strict' (stop at a bad row) or 'skip' (count it and go on), got {self.on_error!r}"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Read and check a file. UsageError says which key is wrong, what was expected and what to do."""
        data = read_json(path)
        try:
            return cls.from_dict(data, Path(path).parent)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: Path) -> RunConfig:
        check_keys(data, [item.name for item in fields(cls)], "run config")
        for key in ("recipe", "data"):
            if key not in data:
                raise UsageError(f"run config: the key {key!r} is missing; a minimal file has model, recipe and data")
        if ("model" in data) == ("init" in data):
            given = "both" if "model" in data else "neither"
            raise UsageError(f'run config: give either "model" (a preset or an object) or "init" (a run whose model goes on), got {given}')
        paths = {key: folder / data[key] for key in ("init", "tokenizer", "media_root") if data.get(key) is not None}
        for key, path in paths.items():
            _must_exist(key, path)
        return cls(
            recipe=parse_recipe(data["recipe"]),
            data=parse_sources(data["data"], folder),
            model=parse_model(data["model"]) if "model" in data else None,
            **{key: data[key] for key in ("window", "on_error") if key in data},
            **paths,
        )


def parse_recipe(data: Any) -> recipes.Recipe:
    """A recipe from {"stage": 1 … 4, overrides …}."""
    if not isinstance(data, Mapping) or data.get("stage") not in recipes.STAGES:
        raise UsageError(f'recipe: expected an object with "stage": one of {", ".join(map(str, recipes.STAGES))}; got {data!r}')
    overrides = {key: value for key, value in data.items() if key != "stage"}
    return recipes.STAGES[data["stage"]](**overrides)


def parse_model(data: Any) -> LongVitaConfig:
    """A model from a preset's name, an object with "preset" and what differs from it, or a whole configuration."""
    if isinstance(data, str):
        return preset(data)
    if not isinstance(data, Mapping):
        raise UsageError(f"model: expected a preset's name or an object, got {data!r}")
    base = preset(data["preset"]).to_dict() if "preset" in data else {}
    return LongVitaConfig.from_dict(_merge(base, {key: value for key, value in data.items() if key != "preset"}))


def parse_sources(data: Any, folder: Path) -> tuple[DataSource, ...]:
    if not isinstance(data, list) or not data:
        raise UsageError(f'data: expected a list of {{"path": "file.jsonl", "ratio": 1.0, "num": 1000}}, got {data!r}')
    sources = []
    for entry in data:
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise UsageError(f'data: every source needs a "path", got {entry!r}')
        check_keys(entry, [item.name for item in fields(DataSource)], "data source")
        path = folder / entry["path"]
        _must_exist("data", path)
        sources.append(DataSource(**{**entry, "path": path}))
    return tuple(sources)


def preset(name: str) -> LongVitaConfig:
    if name not in presets:
        raise UsageError(f"unknown model preset {name!r}{nearest(str(name), presets)}")
    return presets[name]


def read_json(path: str | os.PathLike[str]) -> Any:
    """A JSON file's object. UsageError when it is not there, no JSON, or no object."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a JSON object with keys, got {type(data).__name__}")
    return data


def check_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """UsageError for the first unknown key, with the nearest known one."""
    known = list(known)
    for key in data:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """"; did you mean 'x'? Known: …"."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known: {', '.join(known)}"


def _must_exist(key: str, path: Path) -> None:
    if not path.exists():
        raise UsageError(f"{key}: {path} does not exist; relative paths start at the config file's folder")


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) else value
    return merged
