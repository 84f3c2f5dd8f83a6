"""`longvita plot` and the two figures of longvita.eval.plots."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from longvita.cli.errors import UsageError
from longvita.cli.plot import loss_curves, needle_results
from longvita.cli.runs import last_stage, stages_of
from longvita.eval import plots


def records(steps, start=3.0):
    return [
        {"step": s, "loss": start / s, "lr": 1e-3, "tokens": 64, "tokens_per_second": 1000.0 + s, "fill_rate": 0.9, "skipped": None}
        for s in range(1, steps + 1)
    ]


NEEDLE = {
    "video": {"lengths": [1024, 8192], "depths": [0.0, 0.5, 1.0], "accuracy": [[1.0, 0.9, 1.0], [0.2, None, 0.8]]},
    "text": {"lengths": [1000], "depths": [0.0], "accuracy": [[0.5]], "needle_removed": {"accuracy": 0.08}, "questions": 9},
}


@pytest.fixture
def demo_out(tmp_path):
    """A demo's directory with the metrics of two stages; stage10 must come last."""
    for name, steps in (("stage10", 3), ("stage2", 40)):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records(steps)))
        (folder / "config.json").write_text("{}")
    return tmp_path / "out"


def is_a_picture(path):
    """A PNG of a legible size that is not blank."""
    pixels = np.asarray(Image.open(path).convert("L"), dtype=float)
    return path.read_bytes().startswith(b"\x89PNG") and pixels.shape[0] > 200 and pixels.shape[1] > 300 and pixels.std() > 5


def test_plot_of_a_demo_directory(longvita, demo_out, tmp_path):
    result = longvita("plot", demo_out)
    assert (result.code, result.out) == (0, f"wrote {demo_out / 'loss.png'}\n")
    assert is_a_picture(demo_out / "loss.png")
    result = longvita("plot", demo_out / "stage2", demo_out / "stage10", "--out", tmp_path / "new" / "x.png", "--quiet")
    assert result.out == f"{tmp_path / 'new' / 'x.png'}\n" and is_a_picture(tmp_path / "new" / "x.png")


def test_curves_are_in_natural_order_and_named(demo_out):
    curves = loss_curves([demo_out])
    assert list(curves) == ["stage2", "stage10"] and len(curves["stage2"]) == 40
    (demo_out / "again").mkdir()
    (demo_out / "again" / "stage2").mkdir()
    (demo_out / "again" / "stage2" / "metrics.jsonl").write_text("")
    assert list(loss_curves([demo_out, demo_out / "again"])) == [
        str(demo_out / "stage2"), "stage10", str(demo_out / "again" / "stage2")
    ]  # fmt: skip


def test_runs_are_found(demo_out, tmp_path):
    assert [path.name for path in stages_of(demo_out, "config.json")] == ["stage2", "stage10"]
    assert last_stage(demo_out) == demo_out / "stage10"
    assert last_stage(demo_out / "stage2") == demo_out / "stage2"
    with pytest.raises(UsageError, match="is not a directory: expected a run directory"):
        last_stage(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither it nor a folder in it has a config.json"):
        last_stage(tmp_path / "empty")


def test_plot_of_needle_results(longvita, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"image_accuracy": 0.9, "chance": 0.1, "needle": NEEDLE}))
    result = longvita("plot", tmp_path / "report.json")
    assert result.code == 0 and is_a_picture(tmp_path / "needle.png")
    (tmp_path / "video.json").write_text(json.dumps({"video": NEEDLE["video"]}))
    assert needle_results(tmp_path / "video.json") == ({"video": NEEDLE["video"]}, None)
    assert needle_results(tmp_path / "report.json") == (NEEDLE, 0.1)


def test_plot_of_what_is_no_result(longvita, tmp_path):
    (tmp_path / "x.json").write_text('{"stages": []}')
    result = longvita("plot", tmp_path / "x.json")
    assert result.code == 2 and "expected needle results (lengths, depths, accuracy per kind), got the keys stages" in result.err
    assert "one result at a time, got 2" in longvita("plot", tmp_path / "x.json", tmp_path / "x.json").err
    assert longvita("plot", tmp_path / "nowhere").code == 2


def test_loss_plot_takes_gaps_zeros_and_single_steps(tmp_path):
    rows = records(30)
    rows[4]["loss"] = None
    plots.loss_plot({"one": rows, "empty": [], "two": [{"step": 1, "loss": 2.0}]}, tmp_path / "a.png", title="x")
    assert is_a_picture(tmp_path / "a.png")
    plots.loss_plot({"all gone": [{"step": 1, "loss": None}]}, tmp_path / "b.png")
    plots.loss_plot({"zeros": [{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.0}]}, tmp_path / "c.png")
    with pytest.raises(ValueError, match="nothing to plot: expected at least one run with logged steps"):
        plots.loss_plot({"empty": []}, tmp_path / "d.png")


def test_needle_plot_rejects_a_grid_of_another_shape(tmp_path):
    wrong = {"video": {**NEEDLE["video"], "depths": [0.0]}}
    with pytest.raises(ValueError, match=r"'video': expected accuracy of shape lengths × depths = \(2, 1\), got \(2, 3\)"):
        plots.needle_plot(wrong, tmp_path / "x.png")
    with pytest.raises(ValueError, match="expected results of at least one kind of needle"):
        plots.needle_plot({}, tmp_path / "x.png")
    plots.needle_plot({"text": {"lengths": [64], "depths": [0], "accuracy": [[None]]}}, tmp_path / "x.png", chance=0.1)
    assert is_a_picture(tmp_path / "x.png")


def test_smoothing():
    line = plots.smooth([1.0] * 20, 3.0)
    np.testing.assert_allclose(line, 1.0)
    np.testing.assert_allclose(plots.smooth([1.0, math.nan, 3.0], 1e-3), [1.0, math.nan, 3.0])
    ramp = plots.smooth(np.arange(101.0), 5.0)
    assert ramp[50] == pytest.approx(50.0)  # centred: it does not lag
    assert np.isnan(plots.smooth([math.inf, math.nan], 1.0)).all()
    noisy = np.random.default_rng(0).normal(size=400)
    assert plots.smooth(noisy, 10.0).std() < 0.3 * noisy.std()


def test_short_numbers():
    assert [plots._short(x) for x in (0.0123, 1.0, 3.14159, 12.34, 1234.0, 2.5e6)] == ["0.012", "1", "3.1", "12.3", "1.23K", "2.5M"]
    assert [plots._tokens(n) for n in (1000, 1024, 8192, 2**20)] == ["1000", "1K", "8K", "1M"]
