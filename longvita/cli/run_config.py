"""The run-config JSON of `longvita train`: what to train, how, and on what.

    {
      "model": "tiny",                                  a preset, or {"preset": "tiny", "text": {"num_layers": 6}}
      "init": "runs/stage1",                            instead of "model": go on with this run's newest checkpoint and its tokenizer
      "tokenizer": "tokenizer.json",                    optional: default is that of "init", else a small one is trained on the data
      "recipe": {"stage": 2, "steps": 500, "sequence_length": 2048, "global_batch": 4},
      "data": [{"path": "train.jsonl", "ratio": 1.0, "num": 5000}],
      "media_root": "media",                            optional: the folder that images and videos must lie in; default: beside each JSONL
      "processor": {"max_tiles": 12, "max_fps": 1.0, "limits": {"max_seconds": 600}},  optional: default is that of "init", else the usual
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
from dataclasses import dataclass, field, fields
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
    processor: Mapping[str, Any] = field(default_factory=dict)
    window: int = 256
    on_error: str = "strict"

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise UsageError(f"run config: window must be a whole number of at least 1, got {self.window!r}")
        if self.on_error not in ("strict", "skip"):
            raise UsageError(
                f"run config: on_error must be 'strict' (stop at a bad row) or 'skip' (count it and go on), got {self.on_error!r}"
            )

    def media_folder(self) -> Path:
        """The directory that images and videos must lie in: as configured, else that of the JSONL files. UsageError when unclear."""
        if self.media_root is not None:
            return self.media_root
        # Links are not followed and ".." is: relative media paths start there too (JsonlSource.media_dir).
        folders = {os.path.dirname(os.path.abspath(source.path)) for source in self.data}
        root = os.path.commonpath(folders)
        if root not in folders:
            raise UsageError('data: the JSONL files lie in different folders: name the folder of their media with "media_root"')
        return Path(root)

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
        paths = {}
        for key in ("init", "tokenizer", "media_root"):
            if (path := data.get(key)) is not None:
                if not isinstance(path, str):
                    raise UsageError(f"{key}: expected a path as text, got {path!r}")
                paths[key] = folder / path
                _must_exist(key, paths[key])
        config = cls(
            recipe=parse_recipe(data["recipe"]),
            data=parse_sources(data["data"], folder),
            model=parse_model(data["model"]) if "model" in data else None,
            **{key: data[key] for key in ("window", "on_error") if key in data},
            processor=parse_processor(data.get("processor", {})),
            **paths,
        )
        config.media_folder()
        return config


def parse_recipe(data: Any) -> recipes.Recipe:
    """A recipe from {"stage": 1 … 4, overrides …}."""
    # type(), because true is an int and equals 1
    if not isinstance(data, Mapping) or type(data.get("stage")) is not int or data["stage"] not in recipes.STAGES:
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


def parse_processor(data: Any) -> Mapping[str, Any]:
    """How media are laid out, where it differs from what the model had before: max_tiles, max_fps, limits (MediaLimits without root)."""
    from longvita.data.media import MediaLimits

    if not isinstance(data, Mapping) or not isinstance(limits := data.get("limits", {}), Mapping):
        raise UsageError(f'processor: expected an object such as {{"max_tiles": 12, "limits": {{"max_seconds": 600}}}}, got {data!r}')
    check_keys(data, ["max_tiles", "max_fps", "limits"], "processor")
    defaults = {item.name: item.default for item in fields(MediaLimits) if item.name != "root"}
    check_keys(limits, defaults, "processor.limits")
    for key, value in limits.items():
        if isinstance(defaults[key], tuple) and not isinstance(value, list):
            raise UsageError(f"processor.limits: {key} must be a list of names, got {value!r}")
    MediaLimits(**limits)
    tiles, fps = data.get("max_tiles", 1), data.get("max_fps", 1)
    if type(tiles) is not int or tiles < 1:
        raise UsageError(f"processor: max_tiles must be a whole number of at least 1, got {tiles!r}")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
        raise UsageError(f"processor: max_fps must be a number of frames per second above 0, got {fps!r}")
    return data


def preset(name: str) -> LongVitaConfig:
    if not isinstance(name, str) or name not in presets:
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
    """ "; did you mean 'x'? Known: …"."""
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
