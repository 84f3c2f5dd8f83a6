"""The two figures of a run: the loss over the stages, and the needle heatmaps.

    loss_plot({"stage1": read_metrics("demo-out/stage1/metrics.jsonl"), …}, "loss.png")
    needle_plot(report["needle"], "needle.png")

Colours follow Okabe and Ito, who chose them to stay apart for colour-blind readers (some darkened, so that text in them can be read);
the heatmap runs over cividis for the same reason.
matplotlib is imported inside the functions and draws without a display (Agg).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#A3478A", "#B07900", "#3A8FC4", "#000000")
INK, FAINT = "#222222", "#8a8a8a"
STYLE = {
    "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip
DPI = 130
CONTROLS = {"needle_removed": "needle removed", "stage2_model": "stage 2's model"}
ENDS = 10  # steps whose mean loss labels the beginning and the end of a stage
NARROW = 0.105  # share of the width below which a band's label stands upright


def smooth(values: Sequence[float], width: float) -> np.ndarray:
    """Gaussian mean around each value, `width` values wide (standard deviation): it does not lag. NaN and infinities are left out."""
    series = np.asarray(values, dtype=float)
    finite = np.isfinite(series)
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total = np.convolve(np.where(finite, series, 0.0), kernel)[reach : reach + len(series)]
    weight = np.convolve(finite.astype(float), kernel)[reach : reach + len(series)]
    return np.divide(total, weight, out=np.full(len(series), np.nan), where=weight > 0)


def loss_plot(stages: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str], *, title: str = "Training loss") -> None:
    """One figure over stages that follow each other: the loss, raw and smoothed, and below it tokens per second and the learning rate.

    stages  {name: records in order, as in metrics.jsonl}; a record has "step", "loss" (None: not finite) and, where known,
            "tokens_per_second" and "lr"
    path    PNG to write. ValueError when no stage has a record.
    """
    stages = {name: list(records) for name, records in stages.items() if records}
    if not stages:
        raise ValueError("nothing to plot: expected at least one run with logged steps, got none; train first, or wait for the first step")
    plt = _matplotlib()
    with plt.rc_context(STYLE):
        figure, (top, speed) = plt.subplots(
            2, 1, figsize=(10.5, 6.2), sharex=True, height_ratios=(3.4, 1), layout="constrained", gridspec_kw={"hspace": 0.04}
        )
        rate = speed.twinx()
        start, shown_rate, total = 0, False, sum(records[-1]["step"] for records in stages.values())
        for i, (name, records) in enumerate(stages.items()):
            colour = COLOURS[i % len(COLOURS)]
            end = start + records[-1]["step"]
            for axes in (top, speed):
                axes.axvspan(start, end, color=colour, alpha=0.06, linewidth=0)
            _draw_stage(top, records, start, colour)
            _label_stage(top, name, records, start, end, (end - start) / total, colour)
            _draw_series(speed, records, "tokens_per_second", start, color=colour, linewidth=1.6)
            shown_rate |= _draw_series(rate, records, "lr", start, color=FAINT, linewidth=1.1, linestyle=(0, (4, 2)))
            start = end
        _finish_loss(top, stages, start, title)
        _finish_speed(speed, rate, shown_rate)
        _save(figure, path)


def _draw_stage(axes: Axes, records: Sequence[Mapping[str, Any]], start: int, colour: str) -> None:
    steps = [start + record["step"] for record in records]
    losses = _losses(records)
    few = len(steps) < 3
    axes.plot(steps, losses, color=colour, alpha=1.0 if few else 0.28, linewidth=0.8, marker="o" if few else None)
    axes.plot(steps, smooth(losses, _width(losses)), color=colour, linewidth=2.2, solid_capstyle="round")


def _losses(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([record["loss"] for record in records], dtype=float)  # None becomes NaN


def _width(losses: np.ndarray) -> float:
    return max(1.0, len(losses) / 40)


def _label_stage(axes: Axes, name: str, records: Sequence[Mapping[str, Any]], start: int, end: int, share: float, colour: str) -> None:
    """Name and loss at both ends (means of some steps) on top of the stage's band, upright where it is too narrow for a line of text."""
    losses = _losses(records)
    losses = losses[np.isfinite(losses)]
    width = max(1, min(ENDS, len(losses) // 2))
    first, last = (f"{part.mean():.2g}" if part.size else "–" for part in (losses[:width], losses[-width:]))
    narrow = share < NARROW
    axes.annotate(
        f"{name}{'  ' if narrow else chr(10)}{first} → {last}", ((start + end) / 2, 1),
        xycoords=("data", "axes fraction"), xytext=(0, -6), textcoords="offset points", ha="center", va="top",
        rotation=90 if narrow else 0, fontsize=9, color=colour, fontweight="bold", linespacing=1.4,
    )  # fmt: skip


def _draw_series(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, start: int, **style: Any) -> bool:
    points = [(start + record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    if points:
        axes.plot(*zip(*points, strict=True), marker="." if len(points) == 1 else None, **style)
    return bool(points)


def _finish_loss(axes: Axes, stages: Mapping[str, Sequence[Mapping[str, Any]]], end: int, title: str) -> None:
    losses = np.concatenate([_losses(records) for records in stages.values()])
    losses = losses[np.isfinite(losses)]
    room = 0.34 if min(records[-1]["step"] for records in stages.values()) < NARROW * end else 0.16  # for the labels of the bands
    # Losses fall by orders of magnitude where a task is solved: a linear axis would hide everything after that.
    if losses.size and losses.min() > 0 and losses.max() / losses.min() > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** room)
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + room * (high - low))
    axes.set(title=title, ylabel="loss per supervised token", xlim=(0, max(end, 1)))
    axes.plot([], [], color=INK, alpha=0.35, linewidth=0.8, label="each logged step")
    axes.plot([], [], color=INK, linewidth=2.2, label=f"smoothed (numbers: mean of the first and last {ENDS} steps)")
    axes.legend(loc="lower left", fontsize=8.5, ncols=2)


def _finish_speed(speed: Axes, rate: Axes, shown_rate: bool) -> None:
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    speed.yaxis.set_major_formatter(lambda value, _: _short(value))
    speed.locator_params(axis="y", nbins=4)
    rate.grid(False)
    rate.spines["top"].set_visible(False)
    if shown_rate:
        rate.set_ylabel("learning rate\n(dashed)", color=FAINT)
        rate.set_ylim(0, None)
        rate.tick_params(colors=FAINT)
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value else "0")
        rate.locator_params(axis="y", nbins=4)
    else:
        rate.set_yticks([])


def needle_plot(
    needle: Mapping[str, Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    chance: float | None = None,
    title: str = "Needle: share of right answers",
) -> None:
    """Heatmaps side by side, one per kind ("video", "text"), every cell with its value.

    needle  {kind: {"lengths": tokens, ascending, "depths": shares 0 … 1, "accuracy": [length][depth],
            optional: "mean" (of all questions), "full_length": {"accuracy", "interval"}, and as controls "needle_removed" and
            "stage2_model": {"accuracy"}; each may say how many "questions" it is of}}
    path    PNG to write.  chance  what guessing gives
    ValueError for a kind whose accuracy is not len(lengths) × len(depths).
    """
    if not needle:
        raise ValueError("nothing to plot: expected results of at least one kind of needle (video, text), got none")
    plt = _matplotlib()
    grids = {kind: _grid(kind, result) for kind, result in needle.items()}
    rows, columns = max(grid.shape[0] for grid in grids.values()), sum(max(grid.shape[1], 4) for grid in grids.values())
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            1, len(grids), figsize=(1.6 + 0.98 * columns, 2.5 + 0.66 * rows), squeeze=False, layout="constrained",
            width_ratios=[max(grid.shape[1], 4) for grid in grids.values()],
        )  # fmt: skip
        for axis, (kind, grid) in zip(axes[0], grids.items(), strict=True):
            image = _heatmap(axis, kind, needle[kind], grid)
        bar = figure.colorbar(image, ax=axes[0], shrink=0.92, pad=0.015, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if chance is not None:
            bar.ax.axhline(chance, color="white", linewidth=2.5)
            bar.ax.axhline(chance, color="#D55E00", linewidth=1.5)
            bar.ax.annotate(" chance", (1, chance), xycoords=("axes fraction", "data"), fontsize=8, color="#D55E00", va="center",
                            xytext=(1, 0), textcoords="offset points")  # fmt: skip
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)
        _save(figure, path)


def _grid(kind: str, result: Mapping[str, Any]) -> np.ndarray:
    grid = np.array(result["accuracy"], dtype=float)  # None becomes NaN: a cell that was not measured
    expected = (len(result["lengths"]), len(result["depths"]))
    if grid.shape != expected:
        raise ValueError(f"needle results for {kind!r}: expected accuracy of shape lengths × depths = {expected}, got {grid.shape}")
    return grid


def _heatmap(axes: Axes, kind: str, result: Mapping[str, Any], grid: np.ndarray) -> Any:
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(grid):
        text = "–" if math.isnan(value) else f"{value:.0%}"
        axes.text(column, row, text, ha="center", va="center", fontsize=10, color="white" if value < 0.48 else "#111111")
    axes.set_xticks(range(grid.shape[1]), [f"{depth:.0%}" for depth in result["depths"]])
    axes.set_yticks(range(grid.shape[0]), [_tokens(length) for length in result["lengths"]])
    axes.set_xticks(np.arange(0.5, grid.shape[1] - 1), minor=True)
    axes.set_yticks(np.arange(0.5, grid.shape[0] - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="depth of the needle (0% = start)", ylabel="context, tokens")
    if np.isnan(grid).all():
        facts = ["not measured"]
    else:
        facts = [f"all {result['mean']:.0%}{_asked(result)}" if "mean" in result else f"mean of the cells {np.nanmean(grid):.0%}"]
    if "full_length" in result:
        full = result["full_length"]
        low, high = full["interval"]
        facts.append(f"full length {full['accuracy']:.0%}, {low:.0%} to {high:.0%}{_asked(full)}")
    known = [(words, result[key]) for key, words in CONTROLS.items() if key in result]
    controls = [f"{words} {part['accuracy']:.0%}{_asked(part)}" for words, part in known]
    lines = [" · ".join(facts), "at full length: " + " · ".join(controls)] if controls else [" · ".join(facts)]
    axes.set_title("\n".join([f"{kind} (whole codes)" if kind == "text" else kind, *[""] * len(lines)]), fontsize=11)
    under = {"xycoords": "axes fraction", "xytext": (0, 5), "textcoords": "offset points", "linespacing": 1.35}
    axes.annotate("\n".join(lines), (0, 1), fontsize=9, color="#555555", **under).set_in_layout(False)
    return image


def _asked(part: Mapping[str, Any]) -> str:
    return f" (n = {part['questions']})" if "questions" in part else ""


def _matplotlib() -> Any:
    """matplotlib.pyplot on the backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")
    _matplotlib().close(figure)


def _short(value: float) -> str:
    """1234 → 1.2K, 0.0123 → 0.012."""
    if value >= 1000:
        return f"{value / 1000:.3g}K" if value < 1e6 else f"{value / 1e6:.3g}M"
    return f"{value:.2g}" if value < 10 else f"{value:.3g}"


def _tokens(count: int) -> str:
    """8192 → 8K, 1048576 → 1M, 1000 → 1000."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
