"""`longvita plot`: loss curves of runs, one after the other in one figure, or the heatmaps of a needle result."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from longvita.cli.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="+",
        help="run directories (or a demo's --out directory: all its stages) for the loss; or one report.json or needle.json for heatmaps",
    )
    parser.add_argument("--out", "-o", metavar="PNG", help="file to write; default: loss.png or needle.png beside the first input")
    parser.add_argument("--title", help="the figure's title")


def run(args: argparse.Namespace) -> None:
    from longvita.eval import plots

    title = {"title": args.title} if args.title else {}
    first = Path(args.what[0])
    if first.suffix == ".json":
        if len(args.what) > 1:
            raise UsageError(f"heatmaps are drawn of one result at a time, got {len(args.what)} inputs: call longvita plot for each")
        out = Path(args.out or first.with_name("needle.png"))
        results, chance = needle_results(first)
        plots.needle_plot(results, out, chance=chance, **title)
    else:
        curves = loss_curves(args.what)
        out = Path(args.out or first / "loss.png")
        plots.loss_plot(curves, out, **title)
    print(out if args.quiet else f"wrote {out}")


def loss_curves(directories: list[str]) -> dict[str, list[dict[str, Any]]]:
    """{name: metrics} of every run; stages of one folder are called by their own names, runs of the same name by their paths."""
    from longvita.cli.runs import stages_of
    from longvita.train.metrics import read_metrics

    runs = [stage for directory in directories for stage in stages_of(directory, "metrics.jsonl")]
    names = [run.resolve().name for run in runs]
    return {
        (name if names.count(name) == 1 else str(run)): read_metrics(run / "metrics.jsonl") for name, run in zip(names, runs, strict=True)
    }


def needle_results(path: Path) -> tuple[dict[str, Any], float | None]:
    """{kind: result} and what guessing gives, from a report.json or from what `longvita eval needle --out` wrote."""
    from longvita.cli.run_config import read_json

    report = read_json(path)
    data = report.get("needle", report)
    results = {kind: value for kind, value in data.items() if isinstance(value, dict) and "accuracy" in value}
    if not results:
        raise UsageError(f"{path}: expected needle results (lengths, depths, accuracy per kind), got the keys {', '.join(data) or 'none'}")
    return results, report.get("chance")
