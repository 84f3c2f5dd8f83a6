"""What a run reports: `metrics.jsonl` (the truth), a progress bar on a terminal, plain lines elsewhere.

One JSON object per step:
    step, loss (null when not finite), lr (before any part's multiplier), grad_norm (before clipping; null when not finite),
    tokens and supervised_tokens (of this step, all ranks), tokens_per_second, fill_rate (tokens / room of this step's rows),
    dropped (samples so far, by reason), peak_rss_bytes (this process), seconds (this step), threads (of this process),
    skipped (null, or why no optimizer step was taken: "nothing supervised" or "non-finite")
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

PROGRESS = ("auto", "bar", "lines", "quiet")
SMOOTH = 10  # steps averaged for first_loss and last_loss


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far. From /proc where there is one: getrusage also counts the parent's before exec."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc on this system
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Rows of a metrics.jsonl, in order. A torn last line (the process was killed while writing) is left out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error}); remove the line to go on") from error
    return rows


class MetricsLog:
    """Appends rows to `path`. Opening it cuts every row after step `resume_step`, and a torn last line: a resumed run writes them again."""

    def __init__(self, path: str | os.PathLike, resume_step: int = 0):
        self.path = Path(path)
        keep = 0
        for row, end in _rows_with_ends(self.path):
            if row["step"] > resume_step:
                break
            keep = end
        self._file = open(self.path, "ab", buffering=0)
        self._file.truncate(keep)

    def write(self, row: dict) -> None:
        """One line, handed to the system at once: it survives a kill of the process. OSError when the disk is full."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            remedy = "make room and run the same command again: it resumes from the newest checkpoint"
            raise OSError(error.errno, f"{error.strerror}; {remedy}", str(self.path)) from error

    def sync(self) -> None:
        """Forces the rows to the disk: they survive a power cut. Called with every checkpoint, not with every row."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _rows_with_ends(path: Path):
    """(row, byte offset after it) for every whole row."""
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line), end
            except json.JSONDecodeError:
                return  # garbage after a crash: the rows from here on are written again


def summarize(rows: list[dict]) -> dict:
    """Totals of a run from its rows: over interruptions, not only since the last start.

    first_loss and last_loss are means over up to 10 steps at either end.
    """
    losses = [row["loss"] for row in rows if row["skipped"] is None]
    width = max(1, min(SMOOTH, len(losses) // 2))
    tokens, room = sum(row["tokens"] for row in rows), sum(row["tokens"] / row["fill_rate"] for row in rows if row["fill_rate"])
    return {
        "steps": len(rows),
        "tokens": tokens,
        "supervised_tokens": sum(row["supervised_tokens"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "first_loss": sum(losses[:width]) / width if losses else None,
        "last_loss": sum(losses[-width:]) / width if losses else None,
        "fill_rate": tokens / room if room else 0.0,
        "dropped": rows[-1]["dropped"] if rows else {},
        "skipped_steps": sum(row["skipped"] is not None for row in rows),
        "peak_rss_bytes": max((row["peak_rss_bytes"] for row in rows), default=0),
    }


def format_seconds(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows a run: `mode` "bar" (tqdm), "lines" (one per `log_every` steps), "quiet" (warnings only), "auto" (a bar on a terminal)."""

    def __init__(self, mode: str, name: str, start: int, steps: int, log_every: int, stream=None):
        if mode not in PROGRESS:
            raise ValueError(f"progress: expected one of {', '.join(PROGRESS)}; got {mode!r}")
        self.stream = sys.stderr if stream is None else stream
        self.mode = ("bar" if self.stream.isatty() else "lines") if mode == "auto" else mode
        self.name, self.steps, self.log_every = name, steps, log_every
        self._seconds, self._rows = 0.0, 0
        self._bar = None
        if self.mode == "bar":
            self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", file=self.stream, dynamic_ncols=True, mininterval=0.2)

    def update(self, row: dict) -> None:
        """Takes one metrics row."""
        self._rows += 1  # the first step of a process is slower than all others, so the second begins the mean anew
        self._seconds = row["seconds"] if self._rows <= 2 else 0.9 * self._seconds + 0.1 * row["seconds"]
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(row), refresh=False)
            self._bar.update()
        elif self.mode == "lines" and (row["step"] % self.log_every == 0 or row["step"] in (1, self.steps)):
            left = format_seconds(self._seconds * (self.steps - row["step"]))
            self._print(f"{self.name} {row['step']}/{self.steps}  {self._figures(row)}  ETA {left}")

    @staticmethod
    def _figures(row: dict) -> str:
        loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
        return (
            f"loss {loss}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"fill {row['fill_rate']:.1%}  peak {row['peak_rss_bytes'] / 2**20:,.0f} MiB"
        )

    def note(self, text: str) -> None:
        """Information: not shown when quiet."""
        if self.mode != "quiet":
            self.warn(text)

    def warn(self, text: str) -> None:
        """Always shown."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
