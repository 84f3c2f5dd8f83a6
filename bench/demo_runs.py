"""Kept runs of the demo, and the table of them in docs/demo-runs.md.

    python -m bench.demo_runs keep demo-out seed0          # a finished demo → bench/results/demo/seed0.json
    python -m bench.demo_runs pretrain --seed 10           # pre-training of the decoder alone → bench/results/demo/pretrain-seed10.json
    python -m bench.demo_runs                              # writes docs/demo-runs.md, as the two above do in the end

A test fails while the page and the kept runs disagree.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT, PAGE = ROOT / "bench" / "results" / "demo", ROOT / "docs" / "demo-runs.md"
KINDS, PLANS = ("video", "text"), ("default", "quick", "full")
DROPPED = ("answers", "labels")  # of a report: hundreds of strings that nobody compares

INTRODUCTION = """# Runs of the demo

Every row is one run of `longvita demo` from an empty directory. Shares are of held-out questions, with their 95 % Wilson intervals: images
(one handwritten digit each), a marked frame in a video and a whole code, name and digit, in a text, both at the longest context of the
plan, and the same with the needle removed, where chance is 0.10. `rounds` counts the
rounds of text pre-training that it took until the decoder passed its test.

The minutes cover the whole run: estimate, material, pre-training, training and evaluation. In brackets is the estimate that the run printed
at its start; its factors were calibrated again after seed0 to seed3 and the two runs with `isa` and `torch` in their names. Where the
machine column says 1 thread, a second run used the other core at the same time. The scores of removed video needles, and all scores of
needles of the quick plan, were measured again on the trained models, by a stricter control and with twice the questions; the time is that
of the first measurement. `TFLOP` is these minutes times the rate of a float32 matrix product (`torch.mm`, 1,024 × 1,024) on the same
threads in the same run: divide it by the rate of another machine to judge how long that one would take.

The page is written by `python -m bench.demo_runs` from the reports in `bench/results/demo/`.
"""


def main(argv: list[str] | None = None) -> int:
    description = f"{__doc__.splitlines()[0]} Without an action: write the table from the kept runs."
    parser = argparse.ArgumentParser(prog="python -m bench.demo_runs", description=description)
    actions = parser.add_subparsers(dest="action")
    keep = actions.add_parser("keep", help="keep the report of a finished demo")
    keep.add_argument("out", type=Path, help="the demo's --out directory")
    keep.add_argument("name", help="file name in bench/results/demo/, without .json")
    pretrain = actions.add_parser("pretrain", help="pre-train the decoder of the demo and keep what its test found")
    pretrain.add_argument("--seed", type=int, required=True, help="of data and weights")
    pretrain.add_argument("--plan", choices=PLANS, default="default", help="size of the demo (default: default)")
    args = parser.parse_args(argv)
    KEPT.mkdir(parents=True, exist_ok=True)
    failed = False
    if args.action == "keep":
        report = json.loads((args.out / "report.json").read_text())
        save(args.name, {key: value for key, value in report.items() if key not in DROPPED})
    elif args.action == "pretrain":
        found = pretrain_alone(args.plan, args.seed)
        torch_cap = found["machine"]["torch_capability_cap"]
        caps = [args.plan if args.plan != "default" else None, found["machine"]["instruction_set_cap"], torch_cap and f"torch-{torch_cap}"]
        save("-".join(["pretrain", f"seed{args.seed}", *filter(None, caps)]), found)
        failed = not found["learned"]
    PAGE.write_text(page(kept()))
    return int(failed)


def save(name: str, content: dict) -> None:
    (KEPT / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def pretrain_alone(plan_name: str, seed: int) -> dict:
    """Pre-trains the decoder as the demo does, without its other parts."""
    from longvita.demo import material, pretrain, report
    from longvita.demo.plan import make_plan
    from longvita.model.long_vita import LongVita
    from longvita.threads import AdaptiveThreads

    plan, threads, tokenizer = make_plan(plan_name, seed), AdaptiveThreads(), material.make_tokenizer()
    config = material.make_config(tokenizer)
    tell = functools.partial(print, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        processor = material.make_processor(config, tokenizer, Path(folder))
        start = time.perf_counter()
        found = pretrain.pretrain_text(
            LongVita(config), processor, plan.pretrain, plan.context_tokens, seed, tell, lambda: threads.adapt() and None
        )
    return {
        "plan": plan_name, "seed": seed, "goal": plan.pretrain.recall_goal, "seconds": time.perf_counter() - start, **found,
        "machine": report.machine(),
    }  # fmt: skip


def kept() -> dict[str, dict]:
    """{name: report}, in the order of the page."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))}


def page(runs: dict[str, dict]) -> str:
    """The whole page."""
    demos = {name: run for name, run in runs.items() if "needle" in run}
    alone = {name: run for name, run in runs.items() if "needle" not in run}
    text = [INTRODUCTION]
    for plan in PLANS:
        rows = [demo_row(name, run) for name, run in demos.items() if run["plan"] == plan]
        if rows:
            goals = next(run["goals"] for run in demos.values() if run["plan"] == plan)
            asked = questions(next(run for run in demos.values() if run["plan"] == plan))
            text += [
                f"## Plan `{plan}`", "",
                f"Goals: images {goals['images']}, video {goals['video']}, text {goals['text']}; {goals['recall']} of the short codes. "
                f"Questions: {asked}.", "",
                "| run | machine | images | video | text | removed: video | removed: text | rounds | minutes (estimate) | TFLOP | GiB |",
                "|---|---|---|---|---|---|---|---|---|---|---|", *rows, "",
            ]  # fmt: skip
    if alone:
        text += [
            "## Pre-training of the decoder alone", "",
            "| run | machine | codes recalled | marked frames in words | draws, rounds | learned | seconds |",
            "|---|---|---|---|---|---|---|",
            *(pretrain_row(name, run) for name, run in alone.items()), "",
        ]  # fmt: skip
    return "\n".join(text)


def demo_row(name: str, run: dict) -> str:
    needle, seconds = run["needle"], run["seconds"]
    removed = [share(needle[kind]["needle_removed"]) for kind in KINDS]
    found = [share(needle[kind]["full_length"]) + ("" if run["learned"][kind] else " **not learned**") for kind in KINDS]
    low, high = run["image_interval"]
    images = f"{run['image_accuracy']:.3f} ({low:.2f}–{high:.2f})" + ("" if run["learned"]["images"] else " **not learned**")
    minutes = f"{seconds['total'] / 60:.1f} ({run['estimated']['total'] / 60:.1f})"
    rounds = str(run["pretraining"]["rounds"]) + ("" if run["learned"]["recall"] else " **not learned**")
    work = seconds["total"] * run["machine"]["matmul_gflops"] / 1000
    cells = [
        name, where(run["machine"]), images, *found, *removed, rounds, minutes, f"{work:.0f}",
        f"{run['peak_rss_bytes'] / 2**30:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def questions(run: dict) -> str:
    video = run["needle"]["video"]
    return (
        f"{run['image_questions']} images; for each kind of needle {video['full_length']['questions']} at full length and "
        f"{video['needle_removed']['questions']} with the needle removed"
    )


def pretrain_row(name: str, run: dict) -> str:
    recall = run["recall"]
    return (
        f"| {name} | {where(run['machine'])} | {recall['text']:.3f} | {recall['video']:.3f} | {run['draws']}, {run['rounds']} "
        f"| {'yes' if run['learned'] else '**no**'} | {run['seconds']:.0f} |"
    )


def share(part: dict) -> str:
    low, high = part["interval"]
    return f"{part['accuracy']:.2f} ({low:.2f}–{high:.2f})"


def where(machine: dict) -> str:
    torch = f", torch capped at {machine['torch_capability']}" if machine["torch_capability_cap"] else ""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['processor']}, {threads}, {machine['instruction_set']}{torch}"


if __name__ == "__main__":
    sys.exit(main())
