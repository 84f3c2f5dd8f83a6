"""`longvita config show | diff | check`: models, recipes, run directories and run configurations, as plain JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longvita.cli import Command, add_command
from longvita.cli.errors import UsageError

WHAT = "a model preset (tiny, 1b, 7b, 14b), a recipe (stage1 … stage4), a run directory or a JSON file"


ACTIONS = {
    "show": Command("print one as JSON, with what follows from it", "longvita config show 14b"),
    "diff": Command("print the keys in which two differ", "longvita config diff stage3 stage4"),
    "check": Command("check files without running anything", "longvita config check run.json"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    parsers = {name: add_command(actions, name, action) for name, action in ACTIONS.items()}
    parsers["show"].add_argument("name", help=WHAT)
    parsers["diff"].add_argument("first", help=WHAT)
    parsers["diff"].add_argument("second", help=WHAT)
    parsers["check"].add_argument("files", nargs="+", metavar="FILE", help="run-config or model JSON files, or run directories")


def run(args: argparse.Namespace) -> None:
    if args.action == "show":
        data = resolve(args.name)
        print(json.dumps(data, indent=2, ensure_ascii=False))
        if not args.quiet:
            for line in facts(data):
                print(line, file=sys.stderr)
    elif args.action == "diff":
        for line in differences(resolve(args.first), resolve(args.second)):
            print(line)
    else:
        for file in args.files:
            print(f"{file}: {check(file)}")


def resolve(name: str) -> dict[str, Any]:
    """The configuration behind a name or path, as nested dictionaries."""
    from longvita.cli.run_config import nearest, read_json
    from longvita.config import presets
    from longvita.train import recipes

    stages = {f"stage{number}": stage for number, stage in recipes.STAGES.items()}
    if name in presets:
        return presets[name].to_dict()
    if name in stages:
        return stages[name]().to_dict()
    path = Path(name)
    if path.is_dir():
        return read_json(path / "config.json")
    if path.exists():
        return read_json(path)
    raise UsageError(f"{name!r} is no file and no known name{nearest(name, [*presets, *stages])}")


def check(file: str) -> str:
    """One line that says what a file or run directory holds; ValueError when something in it is wrong."""
    from longvita.cli.run_config import RunConfig, read_json
    from longvita.config import LongVitaConfig
    from longvita.train.recipes import Recipe

    if Path(file).is_dir():
        stored = read_json(Path(file) / "config.json")
        config, recipe = LongVitaConfig.from_dict(stored.get("model", stored)), stored.get("recipe")
        model, recipe = f"a model of {config.num_params():,} parameters", None if recipe is None else Recipe.from_dict(recipe)
    elif {"recipe", "data", "init"} & set(read_json(file)):
        run_config = RunConfig.load(file)
        recipe, count = run_config.recipe, run_config.model and run_config.model.num_params()
        model = f"a model of {count:,} parameters" if count else f"the model of {run_config.init}"
    else:
        model, recipe = f"a model of {LongVitaConfig.load(file).num_params():,} parameters", None
    steps = f", {recipe.name}: {recipe.steps} steps of {recipe.global_batch} × {recipe.sequence_length:,} tokens" if recipe else ""
    return f"ok: {model}{steps}"


def facts(data: Mapping[str, Any]) -> Iterator[str]:
    """What follows from a model's numbers: lines for a person to read."""
    from longvita.config import LongVitaConfig

    if not isinstance(model := data.get("model", data), Mapping) or "text" not in model:
        return
    config = LongVitaConfig.from_dict(model)
    parts = ", ".join(f"{name} {count:,}" for name, count in config.params_by_part().items())
    yield f"{config.num_params():,} parameters ({parts})"
    cache = config.kv_bytes_per_token("bfloat16")
    yield f"{config.vision.tokens_per_tile} tokens per tile; key/value cache of {cache:,} bytes per token in bf16"


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """Lines "key: a → b" for every leaf that differs; (none) stands for a missing one."""
    a, b = flatten(first), flatten(second)
    for key in [*a, *(key for key in b if key not in a)]:
        if a.get(key, ...) != b.get(key, ...):
            show = [json.dumps(side[key], ensure_ascii=False) if key in side else "(none)" for side in (a, b)]
            yield f"{key}: {show[0]} → {show[1]}"


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"text": {"num_layers": 2}} → {"text.num_layers": 2}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
