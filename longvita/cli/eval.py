"""`longvita eval needle`: one marked frame in a long video, one code in a long text, at several lengths and depths."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from longvita.cli import Command, add_command

TASKS = {
    "needle": Command(
        "find one marked frame in a long video, one code in a long text",
        "longvita eval needle demo-out --kind video --lengths 1024,4096 --depths 0,0.5,1 --out needle.json",
    ),
}


def lengths(text: str) -> list[int]:
    """ "1024,2K,8k" → [1024, 2048, 8192], ascending."""
    units = {"K": 2**10, "M": 2**20}
    found = []
    for part in text.split(","):
        number, unit = (part[:-1], units[part[-1].upper()]) if part[-1:].upper() in units else (part, 1)
        if not number.strip().isdigit() or int(number) < 1:
            raise argparse.ArgumentTypeError(f"expected token counts like 1024,2K,8K; got {part!r}")
        found.append(int(number) * unit)
    return sorted(set(found))


def depths(text: str) -> list[float]:
    """ "0,0.5,1" → [0.0, 0.5, 1.0], ascending."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected shares from 0 (the start) to 1 (the end) like 0,0.5,1; got {text!r}") from error
    if not all(0 <= depth <= 1 for depth in found):
        raise argparse.ArgumentTypeError(f"depths go from 0 (the start) to 1 (the end); got {text!r}")
    return found


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", title="tasks", required=True)
    needle = add_command(tasks, "needle", TASKS["needle"])
    needle.add_argument("run_dir", metavar="RUN", help="a run directory, or a demo's --out directory (its last stage)")
    needle.add_argument("--kind", choices=("video", "text", "both"), default="both", help="which needle to test (default: both)")
    needle.add_argument("--lengths", type=lengths, metavar="N,N,…", help="tokens of context: 1K,2K,8K (default: up to the trained length)")
    needle.add_argument("--depths", type=depths, metavar="D,D,…", help="where the needle lies: 0 start, 1 end (default: five places)")
    needle.add_argument("--questions", type=positive, default=200, metavar="N", help="questions per kind over the grid (default: 200)")
    needle.add_argument("--seed", type=int, default=0, help="which questions are drawn (default: 0)")
    needle.add_argument("--out", metavar="JSON", help="also write the result here")
    needle.add_argument("--plot", metavar="PNG", help="also draw the heatmaps here")


def run(args: argparse.Namespace) -> None:
    from longvita.cli.runs import last_stage

    run_dir = last_stage(args.run_dir)
    from longvita.eval.needle import evaluate_run
    from longvita.threads import AdaptiveThreads

    kinds = ("video", "text") if args.kind == "both" else (args.kind,)
    tell = None if args.quiet else lambda line: print(line, file=sys.stderr, flush=True)
    threads = AdaptiveThreads()

    def each_question() -> None:
        change = threads.adapt()
        if change and tell:
            tell(change)

    result = evaluate_run(
        run_dir, kinds=kinds, lengths=args.lengths, depths=args.depths, questions=args.questions, seed=args.seed, progress=tell,
        each_question=each_question,
    )  # fmt: skip
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        from longvita.eval.needle import CHANCE
        from longvita.eval.plots import needle_plot

        needle_plot({kind: result[kind] for kind in kinds}, args.plot, chance=CHANCE)
    for kind in kinds:
        print("\n".join(table(kind, result[kind])))


def table(kind: str, result: dict[str, Any]) -> list[str]:
    """The grid as lines of text: a row per length, a column per depth."""
    what = "share of whole codes" if kind == "text" else "share of right answers"
    lines = [f"{kind} needle, {what}: {result['mean']:.3f} of {result['questions']} questions"]
    lines.append("tokens \\ depth " + "".join(f"{depth:>7.2f}" for depth in result["depths"]) + "    all (95 % interval)")
    for length, row, total in zip(result["lengths"], result["accuracy"], result["by_length"], strict=True):
        low, high = total["interval"]
        lines.append(
            f"{length:>14,} " + "".join("      –" if value is None else f"{value:>7.2f}" for value in row)
            + f"   {total['accuracy']:.2f} ({low:.2f}–{high:.2f})"
        )  # fmt: skip
    return lines
