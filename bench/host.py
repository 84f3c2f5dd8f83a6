"""CPU work outside the ops: command-line start-up, planning of context parallelism, encoding of video frames, refusing hostile media."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import ring_simulation
from bench.harness import OURS, Case, Setup, peak, seconds, times_as_long
from longvita_kernels import plan_context_parallel

MILLION = 1 << 20
SHORT = f"{OURS}, 56 frames"


def _command(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def _help() -> Setup:
    def show():
        return _command("import sys; from longvita.cli import main; sys.exit(main(['--help']))")

    def check():
        done = show()
        return [] if done.returncode == 0 and "longvita demo" in done.stdout else [f"--help failed: {done.stderr}"]

    return Setup(calls={OURS: show, "python alone": lambda: _command("")}, check=check)


def _planning(mixture: str, ranks: int, per_node: int | None) -> Setup:
    offsets = [0, *itertools.accumulate(ring_simulation.mixtures(MILLION)[mixture])]

    def plan():
        return plan_context_parallel(offsets, ranks, ranks_per_node=per_node)

    def check():
        imbalance = plan().imbalance
        return [] if imbalance <= 1.02 else [f"the most loaded rank has {imbalance:.3f} times the mean work"]

    return Setup(calls={OURS: plan}, check=check)


def _frames() -> Setup:
    from longvita.config import presets
    from longvita.data.processor import Processor
    from longvita.data.template import ChatTokenizer

    tokenizer = ChatTokenizer.train_bpe(["Which frame? seven"], 320)
    processor = Processor(dataclasses.replace(presets["tiny"], tokens=tokenizer.token_ids), tokenizer)

    def encode(count):
        video = {"type": "video", "video": np.zeros((count, 32, 32, 3), dtype=np.uint8)}
        question = {"role": "user", "content": [video, {"type": "text", "text": "Which frame?"}]}
        return processor.encode([question, {"role": "assistant", "content": "seven"}], max_tokens=8192).loaded()

    def check():
        tokens = encode(448).num_tokens
        return [] if tokens > 8000 else [f"the sample has {tokens} tokens; expected more than 8,000"]

    return Setup(calls={OURS: lambda: encode(448), SHORT: lambda: encode(56)}, check=check)


def _refusal(name: str) -> Setup:
    from bench import hostile
    from longvita.data.media import MediaError, MediaLimits, open_image, open_video, sample_frames

    folder = tempfile.TemporaryDirectory()
    hostile.write(Path(folder.name))

    def refuse(folder=folder):  # the default keeps the folder for as long as the call is kept
        path, limits = Path(folder.name) / name, MediaLimits()
        try:
            if path.suffix == ".png":
                open_image(path, limits).load()
            else:
                video = open_video(path, limits)
                video.read(sample_frames(video.num_frames, video.fps, 64), 16)
        except MediaError as error:
            return error.reason

    def check():
        reason = refuse()
        return [] if reason == hostile.REASONS[name] else [f"{name}: expected a refusal for {hostile.REASONS[name]!r}, got {reason!r}"]

    return Setup(calls={OURS: refuse}, check=check)


def cases() -> Iterator[Case]:
    none = {"op": "host", "flops": 0, "bytes": 0, "ceiling": None}
    yield Case(label="longvita --help", build=_help, goals=(seconds(0.3),), **none)
    for mixture in ring_simulation.mixtures():
        for ranks, per_node in ((8, None), (64, None), (64, 8)):
            label = f"planning 1,048,576 tokens, {mixture}, {ranks} ranks" + ("" if per_node is None else f" in nodes of {per_node}")
            yield Case(label=label, build=functools.partial(_planning, mixture, ranks, per_node), goals=(seconds(0.05),), **none)
    yield Case(label="448 frames as a sample", build=_frames, goals=(times_as_long(SHORT, least=1 / 12),), **none)
    for name in ("bomb.png", "cut.png", "sized.mp4", "noise.mkv", "sparse.mp4"):
        yield Case(label=f"refusing {name}", build=functools.partial(_refusal, name), goals=(seconds(1.0), peak(200 << 20)), **none)


def cuda_cases() -> Iterator[Case]:
    """Nothing here runs on a GPU."""
    return iter(())
