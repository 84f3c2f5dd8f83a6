"""Results as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

from bench.harness import OURS, Result


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 10 << 20 else f"{count / 2**20:.1f} MiB"


def rate(result: Result, name: str) -> str:
    case = result.case
    if case.ceiling is None:
        return ""
    if case.ceiling == "read":
        return f"{case.bytes / result.seconds[name] / 1e9:.1f} GB/s"
    return f"{case.flops / result.seconds[name] / 1e9:.1f} GFLOP/s"


def lines(result: Result) -> list[str]:
    """A few lines of text about one result."""
    case = result.case
    if result.problems:
        return [f"{case.op}: {case.name}", *(f"    REFUSED: {problem}" for problem in result.problems)]
    facts = [f"{result.rounds} rounds"]
    if case.ceiling is not None:
        unit = "GFLOP/s" if case.ceiling == "mm" else "GB/s"
        facts.insert(0, f"{result.share:.2f} × {case.ceiling} ({result.ceiling_rate / 1e9:.1f} {unit})")
    out = [f"{case.op}: {case.name}", f"    {', '.join(facts)}", *(f"    {line}" for line in goal_lines(result))]
    for name, seconds in result.seconds.items():
        ratio = "" if name == OURS else f"{seconds / result.seconds[OURS]:6.2f} ×"
        out.append(f"    {name:34s} {_duration(seconds):>10s} {rate(result, name):>16s} {ratio:>9s}".rstrip())
    return [*out, *(f"    {name:34s} did not run: {why}" for name, why in result.failed.items())]


def goal_lines(result: Result) -> list[str]:
    """A line for each goal whose figure was measured."""
    found = []
    for goal in result.case.goals:
        figure = goal.figure(result)
        if figure is not None:
            wanted = f"at least {goal.least:.4g}" if goal.least > -math.inf else f"at most {goal.most:.4g}"
            found.append(f"{goal.what}: {figure:.4g}, goal {wanted}: {'met' if goal.met(result) else 'NOT MET'}")
    return found


def memory_line(result: Result) -> str:
    """Peak memory of the calls of one case."""
    facts = ", ".join(f"{name} {_size(size)}" for name, size in result.peak_bytes.items())
    return f"    {result.case.op}: {result.case.name}: {facts}"


def as_dict(result: Result) -> dict:
    """One result for JSON."""
    case = result.case
    out = {
        "op": case.op, "case": case.label, "direction": case.direction, "dtype": case.dtype_name,
        "flops": case.flops, "bytes": case.bytes, "ceiling": case.ceiling, "problems": result.problems,
    }  # fmt: skip
    if not result.problems:
        out |= {
            "ceiling_rate": result.ceiling_rate, "share": result.share and round(result.share, 4), "goals": goal_lines(result),
            "rounds": result.rounds, "seconds": {name: float(f"{s:.4g}") for name, s in result.seconds.items()},
            "peak_bytes": result.peak_bytes, **({"failed": result.failed} if result.failed else {}),
        }  # fmt: skip
    return out


def write_json(path: Path, report: dict) -> None:
    """Written beside and renamed, so that a file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def plot(path: Path, results: list[Result]) -> None:
    """Bars: share of the ceiling, the op and its peers side by side, one group a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [r for r in results if not r.problems and r.case.ceiling is not None]
    if not good:
        raise ValueError("there is nothing to plot: expected at least one case that has a ceiling and passed its check; choose others")
    names = list(dict.fromkeys(name for r in good for name in r.seconds))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.32 * sum(len(r.seconds) + 1 for r in good)))
    at, ticks, labels = 0.0, [], []
    colours = dict(zip(names, plt.get_cmap("tab10").colors * 3, strict=False))
    seen = set()
    for r in good:
        start = at
        for name, seconds in r.seconds.items():
            share = r.share * r.seconds[OURS] / seconds
            axes.barh(at, share, color=colours[name], label=None if name in seen else name)
            axes.text(share, at, f" {share:.2f}", va="center", fontsize=7)
            seen.add(name)
            at += 1
        for goal in (goal for goal in r.case.goals if goal.what == "share of the ceiling"):
            axes.plot([goal.least] * 2, [start - 0.5, at - 0.5], color="black", linewidth=1)
        ticks.append((start + at - 1) / 2)
        labels.append(f"{r.case.label}\n{r.case.direction}, {r.case.dtype_name}")
        at += 1
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the ceiling (torch.mm of the same dtype, or reading memory); black line: goal")
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
