"""metrics.jsonl survives what happens to files; totals; what is shown on a terminal, elsewhere and when quiet."""

import io
import json
import resource
import subprocess
import sys

import pytest

from longvita.train import metrics


def row(step, **changes):
    base = {
        "step": step, "loss": 5.0 - step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 90, "supervised_tokens": 40, "tokens_per_second": 900.0,
        "fill_rate": 0.9, "dropped": {"too long": step}, "peak_rss_bytes": 100 * 2**20 + step, "seconds": 0.1, "skipped": None,
    }  # fmt: skip
    return {**base, **changes}


def test_rows_after_the_resumed_step_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.MetricsLog(path)
    for step in range(1, 6):
        log.write(row(step))
    log.sync()
    log.close()
    log = metrics.MetricsLog(path, resume_step=3)
    log.write(row(4, loss=0.25))
    assert [r["step"] for r in metrics.read_metrics(path)] == [1, 2, 3, 4]  # written rows can be read at once
    assert metrics.read_metrics(path)[-1]["loss"] == 0.25
    log.close()
    metrics.MetricsLog(path).close()  # a fresh run
    assert metrics.read_metrics(path) == []


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3}', "\0\0\0\n", '{"step": 3, "lo\n{"step": 4}\n'])
def test_a_torn_end_is_cut(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2)) + tail)
    metrics.MetricsLog(path, resume_step=10).close()
    assert [r["step"] for r in metrics.read_metrics(path)] == [1, 2]


def test_reading(tmp_path):
    assert metrics.read_metrics(tmp_path / "none.jsonl") == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert metrics.read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nhello\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: not a JSON object .*; remove the line"):
        metrics.read_metrics(path)


def test_not_finite_is_no_json(tmp_path):
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write(row(1, loss=float("nan")))
    log.close()


@pytest.mark.parametrize("room", [0, 100])
def test_a_full_disk_is_explained_and_the_torn_row_cut(tmp_path, room):
    path = tmp_path / "metrics.jsonl"
    log = metrics.MetricsLog(path)
    log.write(row(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, limits[1]))
    try:
        with pytest.raises(OSError, match="make room and run the same command again: it resumes from the newest checkpoint.*metrics.jsonl"):
            log.write(row(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.close()
    assert [r["step"] for r in metrics.read_metrics(path)] == [1]
    metrics.MetricsLog(path, resume_step=1).close()
    assert path.read_text().count("\n") == 1 and path.read_text().endswith("\n")


def test_totals_by_hand():
    rows = [row(step, loss=float(step)) for step in range(1, 31)]
    rows[3] = row(4, loss=None, skipped="non-finite")
    rows.append(row(31, loss=0.0, tokens=45, fill_rate=0.45, skipped="nothing supervised"))
    total = metrics.summarize(rows)
    assert total["steps"] == 31 and total["skipped_steps"] == 2
    assert total["tokens"] == 30 * 90 + 45 and total["supervised_tokens"] == 31 * 40
    assert total["first_loss"] == pytest.approx((sum(range(1, 12)) - 4) / 10) and total["last_loss"] == pytest.approx(25.5)
    assert total["fill_rate"] == pytest.approx((30 * 90 + 45) / 3100)
    assert total["seconds"] == pytest.approx(3.1)
    assert total["dropped"] == {"too long": 31} and total["peak_rss_bytes"] == 100 * 2**20 + 31
    assert metrics.summarize([])["first_loss"] is None and metrics.summarize([row(1)])["last_loss"] == 4.0


def show(mode, rows, steps=20, log_every=10, tty=False):
    stream = io.StringIO()
    stream.isatty = lambda: tty
    progress = metrics.Progress(mode, "stage1", 0, steps, log_every, stream)
    for r in rows:
        progress.update(r)
    progress.note("a note")
    progress.warn("a warning")
    progress.close()
    return stream.getvalue()


def test_plain_lines():
    lines = show("auto", [row(step) for step in range(1, 21)]).splitlines()
    assert len(lines) == 3 + 2  # steps 1, 10 and 20
    assert lines[0] == "stage1 1/20  loss 4.0000  lr 1.00e-03  900 tokens/s  fill 90.0%  peak 100 MiB  ETA 0:02"
    assert lines[2].endswith("ETA 0:00") and lines[3:] == ["a note", "a warning"]
    assert "loss none" in show("lines", [row(1, loss=None)])


def test_bar_on_a_terminal_and_quiet():
    shown = show("auto", [row(1)], tty=True)
    assert "stage1" in shown and "1/20" in shown and "a warning" in shown
    assert show("quiet", [row(1)]) == "a warning\n"
    with pytest.raises(ValueError, match="progress: expected one of auto, bar, lines, quiet; got 'loud'"):
        metrics.Progress("loud", "stage1", 0, 1, 1)


def test_format_seconds():
    assert [metrics.format_seconds(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]


def test_peak_memory_is_of_this_process_alone():
    """A child of a large process must not report its parent's memory."""
    before = metrics.peak_rss_bytes()
    ballast = bytearray(300 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert metrics.peak_rss_bytes() >= before and metrics.peak_rss_bytes() > 300 * 2**20
    code = "from longvita.train.metrics import peak_rss_bytes; print(peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**20 < int(child.stdout) < 300 * 2**20
