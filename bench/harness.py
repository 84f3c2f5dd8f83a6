"""A case, and how it is measured: correctness first, then everything interleaved; peak memory apart, when no more times are taken.

Shared machines change speed from second to second. So every call that is compared stands in the same rounds, one after the other; a figure
is the median over the rounds, a ratio is taken within one case, and the ceiling is measured in the very same rounds.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

OURS = "longvita"
SAMPLE_SECONDS = 0.02  # a shorter call is repeated until one sample takes this long
MIN_ROUNDS, MAX_ROUNDS = 3, 50


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The tensors of a case, made: what to call.

    calls   name → call without arguments; OURS is the op, other names starting with it are variants of it, the rest are peers
    check   → what is wrong with the op on these tensors, as lines; empty if the accuracy rule holds
    """

    calls: dict[str, Callable[[], object]]
    check: Callable[[], list[str]]


@dataclass(frozen=True)
class Goal:
    """A figure of a result, None where what it needs was not measured, and the least or the most that it is meant to be."""

    what: str
    figure: Callable[[Result], float | None]
    least: float = -math.inf
    most: float = math.inf

    def met(self, result: Result) -> bool | None:
        figure = self.figure(result)
        return None if figure is None else self.least <= figure <= self.most


def share(least: float, name: str = OURS, work: float = 1.0) -> Goal:
    """Share of the ceiling, `work`: the FLOPs or bytes of this call over the case's."""
    text = "share of the ceiling" if name == OURS else f"{name}: share of the ceiling, work counted {work:.2f} times"
    return Goal(text, lambda r: work * r.share * r.seconds[OURS] / r.seconds[name] if name in r.seconds else None, least=least)


def times_as_long(name: str, least: float = -math.inf, most: float = math.inf) -> Goal:
    """Time of another call over the op's."""
    figure = lambda r: r.seconds[name] / r.seconds[OURS] if name in r.seconds else None  # noqa: E731
    return Goal(f"{name} ÷ {OURS}", figure, least, most)


def best_peer(least: float = 1.0, besides: tuple[str, ...] = ()) -> Goal:
    """Time of the fastest peer over the op's; `besides`: calls that are no peers."""
    return Goal("best peer ÷ longvita", lambda r: min((x for name, x in r.peers.items() if name not in besides), default=None), least)


def seconds(most: float) -> Goal:
    return Goal("seconds", lambda r: r.seconds[OURS], most=most)


def peak(most: int, name: str = OURS) -> Goal:
    """Peak memory of a call in bytes, its results included."""
    return Goal(f"{name}: peak bytes", lambda r: r.peak_bytes.get(name), most=most)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured case: an op on one shape, or another operation of the host.

    dtype, direction  of an op's case; None and "" where there is neither
    flops, bytes  useful work of one call: what the definition needs, masked pairs and recomputation not counted
    ceiling       "mm" (torch.mm of the same dtype) or "read" (reading memory): what the share is a share of; None: nothing of the kind
    goals         what the op is meant to reach on a CPU
    heavy         left out unless asked for: minutes on a small machine
    """

    op: str
    label: str
    dtype: torch.dtype | None = None
    direction: str = ""
    flops: int
    bytes: int
    ceiling: str | None
    build: Callable[[], Setup]
    goals: tuple[Goal, ...] = ()
    heavy: bool = False

    def __post_init__(self):
        if self.ceiling not in ("mm", "read", None):
            raise ValueError(f"ceiling is {self.ceiling!r}; expected 'mm', 'read' or None")

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.label, self.direction, self.dtype_name) if part)

    @property
    def dtype_name(self) -> str:
        return "" if self.dtype is None else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a case gave. seconds: name → median of one call; empty where problems were found."""

    case: Case
    problems: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # peer → why it did not run
    ceiling_rate: float = 0.0  # FLOP/s of mm, bytes/s of read

    @property
    def share(self) -> float | None:
        """Share of the ceiling that the op reached."""
        if self.case.ceiling is None:
            return None
        work = self.case.flops if self.case.ceiling == "mm" else self.case.bytes
        return work / self.seconds[OURS] / self.ceiling_rate

    @property
    def peers(self) -> dict[str, float]:
        """peer → how many times longer it takes than the op."""
        return {name: s / self.seconds[OURS] for name, s in self.seconds.items() if not name.startswith(OURS)}


# ---------------------------------------------------------------------------------------------------------------------------------- time


def timed(call: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Seconds of `repeats` calls one after the other; on a GPU from when it is idle until it is idle again."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return time.perf_counter() - start


def once(call: Callable[[], object], device: str = "cpu") -> float:
    return timed(call, 1, device)


def interleave(calls: dict[str, Callable[[], object]], seconds: float, device: str = "cpu") -> tuple[dict[str, float], int]:
    """Median seconds of one call of each, over rounds of all of them that fill about `seconds`; and the number of rounds."""
    first = {}
    for name, call in calls.items():
        call()  # whatever happens only once: compilation, packing, page faults
        first[name] = once(call, device)
    repeats = {name: max(1, math.ceil(SAMPLE_SECONDS / max(duration, 1e-7))) for name, duration in first.items()}
    round_seconds = sum(first[name] * repeats[name] for name in calls)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(timed(call, repeats[name], device) / repeats[name])
    return {name: statistics.median(values) for name, values in samples.items()}, rounds


# -------------------------------------------------------------------------------------------------------------------------------- memory

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def cuda_peak_bytes(call: Callable[[], object]) -> int:
    """Most memory that torch gave out on the GPU during one call, above what it had given out before."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory that the process held during one call, above what it held before: results, scratch and what libraries take on the way.

    Linux. Blocks from 64 KiB on go back to the system when they are freed, from the first use of this function on: take times before.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 64 << 10)
    libc.mallopt(_M_TRIM_THRESHOLD, 0)
    call()
    gc.collect()
    libc.malloc_trim(0)
    before = _status_bytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the high-water mark begins anew
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


# ----------------------------------------------------------------------------------------------------------------------------------- run


def generator(seed: int = 0) -> torch.Generator:
    """Random numbers for the tensors of a case, on the device they are made on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not compile, does not fit the GPU or does not run."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _running(calls: dict[str, Callable[[], object]], device: str) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The op's calls and those of peers that run, and why others do not: a peer that cannot take a case must not cost the op its figure."""
    running, failed = {}, {}
    for name, call in calls.items():
        if not name.startswith(OURS):
            try:
                once(call, device)
            except failures() as error:
                failed[name] = reason(error)
                continue
        running[name] = call
    return running, failed


def measure(case: Case, ceiling: tuple[Callable[[], object], int] | None, seconds: float, device: str = "cpu") -> Result:
    """Check and time one case. `ceiling`: a call, and the FLOPs or bytes that it does. An op that is wrong gets no times."""
    with torch.device(device):
        setup = case.build()
        problems = setup.check()
    if problems:
        return Result(case=case, problems=problems)
    calls, failed = _running(setup.calls, device)
    times, rounds = interleave(calls if ceiling is None else {**calls, "ceiling": ceiling[0]}, seconds, device)
    rate = 0.0 if ceiling is None else ceiling[1] / times.pop("ceiling")
    return Result(case=case, problems=[], seconds=times, rounds=rounds, ceiling_rate=rate, failed=failed)


def weigh(result: Result, device: str = "cpu") -> dict[str, int]:
    """Peak memory of every call that was timed. What it takes for that (see peak_bytes) stays for the process: no times after it."""
    with torch.device(device):
        calls = result.case.build().calls
    return {name: (cuda_peak_bytes if device == "cuda" else peak_bytes)(calls[name]) for name in result.seconds}


def gradients(function: Callable[..., torch.Tensor], inputs: tuple, grad: torch.Tensor) -> Callable[[], object]:
    """A call that runs function(*inputs) forward and backward from `grad`."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)
