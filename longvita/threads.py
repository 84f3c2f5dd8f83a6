"""How many threads compute, and how they wait for each other, on a machine that other programs use too.

    set_wait_policy()                  # before torch is imported: the command line does both first
    keep_to_quota()
    threads = AdaptiveThreads()        # imports torch; call it on the thread that trains
    for batch in loader:
        train_step(batch)
        change = threads.adapt()       # None, or a line that says what changed and why

A parallel loop ends when its last thread is done. If another program keeps one core busy, one of the threads is preempted, and the others
wait for it. They wait by spinning, and libgomp spins for so long by default that this uses up the time slices in which the work could be
done: on 2 cores, beside a process that keeps one of them busy, training of the tiny model fell to 0.08 (short steps) and 0.31 (steps of 8K
tokens) of its undisturbed rate. A shorter spin (`set_wait_policy`) alone gives 0.09 and 0.43. With one thread for each free core as well
(`AdaptiveThreads`), it is 0.74 and 0.53 (bench/results/busy-spr.json).

With another number of threads torch's own CPU kernels sum in another order (matrix products with more than about 1,000 rows to sum over,
sums over a whole tensor, gradients of convolutions), so results differ in their last bits. Where runs must agree bit for bit on a CPU, fix
the number with OMP_NUM_THREADS: then `AdaptiveThreads` does nothing.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

# How many times a waiting thread polls before it sleeps, unless the user sets it. libgomp's own default, 300,000, takes 3 ms or more, about
# as long as the time slice of the thread that it waits for. A training step of the tiny model is in Python for 10 to 100 µs between two
# parallel loops, now and then for longer, and waking a thread that sleeps takes about 40 µs: spinning should bridge these gaps. Alone on 2
# cores, stage 2 of the demo ran at 0.86 of the rate under libgomp's default with 10,000 polls, at 0.97 with 30,000 and at 1.01 with
# 100,000. One poll is a PAUSE instruction, which takes about 10 ns there and 47 ns on an Ice Lake, so 100,000 polls are 1 to 5 ms. That
# alone helps little beside another program; `AdaptiveThreads` does the rest.
SPIN_COUNT = 100_000
WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
FIXED_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # either of them decides torch's number of threads
CPU_LIMIT_V1, CPU_LIMIT_V2 = ("cpu.cfs_quota_us", "cpu.cfs_period_us"), ("cpu.max",)  # files of a control group: microseconds

INTERVAL = 0.5  # seconds between two readings; the system counts CPU time in ticks of 10 ms, so shorter ones are too coarse
# A thread gives way when other programs take more than TAKEN of its core. They get less than they want while we compete with them: a
# process that would keep a core busy gets about half of it.
TAKEN = 0.3
NOISE = 0.1  # times the root of the number of cores is tolerated instead, where that is more: so much may the ticks be wrong by
PATIENCE = 2  # readings in a row that must find a core free, less than half of TAKEN in use, before it is used again
MAX_PATIENCE = 16  # the same limit after a core was free only briefly: another program comes and goes


def set_wait_policy(environment: MutableMapping[str, str] = os.environ) -> None:
    """Limits how long idle threads spin, in this process and its children, unless the user has said how they should wait.

    libgomp reads the limit when it is loaded, with torch. After that a call does nothing.
    """
    if "torch" not in sys.modules and not any(name in environment for name in WAIT_VARIABLES):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def wait_policy(environment: Mapping[str, str] = os.environ) -> str:
    """How idle threads wait, as a user would set it."""
    return " ".join(f"{name}={environment[name]}" for name in WAIT_VARIABLES if name in environment) or "the OpenMP runtime's default"


def core_quota(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many cores' worth of time the control groups of this process allow it (`docker run --cpus 1.5`, a pod's limit), or None.

    Reads both versions of control groups. The smallest limit among the process's group and its ancestors applies; in a container some of
    their directories may not be visible.
    """
    try:
        lines = os.fsdecode(groups.read_bytes()).splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, files = (mount / "cpu", CPU_LIMIT_V1) if controllers else (mount, CPU_LIMIT_V2)
        group = top / path.strip("/")
        for directory in (group, *group.parents):
            try:
                quota, period = (int(word) for name in files for word in (directory / name).read_text(encoding="ascii").split())
            except (OSError, ValueError):  # no such file here; "max" is no number
                quota = period = -1
            if quota > 0 and period > 0:
                quotas.append(quota / period)
            if directory == top:
                break
    return min(quotas, default=None)


def keep_to_quota(environment: MutableMapping[str, str] = os.environ) -> None:
    """Fixes the number of threads at what the control groups allow, if that is less than there are cores and the user has not fixed it.

    Where more threads run than the quota pays for, it is used up early in each period (100 ms), and then all of them stop until the next.
    The OpenMP runtime does not know of quotas. After torch is imported a call does nothing.
    """
    quota = core_quota()
    if "torch" in sys.modules or quota is None or any(environment.get(name) for name in FIXED_BY):
        return
    if math.ceil(quota) < len(os.sched_getaffinity(0)):
        environment["OMP_NUM_THREADS"] = str(max(1, math.ceil(quota)))


class Usage(NamedTuple):
    """CPU time so far, in seconds, of the cores on which this process may run."""

    cores: int
    clock: float  # the time of the reading
    busy: float  # of all programs on these cores, with what the hypervisor gave to other machines
    own: float  # of all threads of this process, without its children


def read_usage() -> Usage | None:
    """A reading of /proc/stat, or None on a system that does not have it."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            lines = [line.split() for line in file if line.startswith("cpu")]
    except OSError:
        return None
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    # user, nice, system, idle, iowait, irq, softirq, steal; what guests use is part of user
    counts = [[int(word) for word in line[1:9]] for line in lines if line[0] in mine]
    if len(counts) != len(mine):  # some containers number the cores of this file in their own way
        return None
    ticks = sum(sum(count) - count[3] - count[4] for count in counts)
    return Usage(len(counts), time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())


def cores_taken(before: Usage, after: Usage) -> float:
    """How many cores other programs kept busy, on average, between two readings."""
    taken = (after.busy - before.busy - (after.own - before.own)) / max(after.clock - before.clock, 1e-9)
    return min(max(taken, 0.0), float(after.cores))


def sample_cores_taken(seconds: float = 0.3) -> float | None:
    """How many cores other programs keep busy now, or None on a system that does not say."""
    before = read_usage()
    time.sleep(seconds)
    after = read_usage()
    return None if before is None or after is None else cores_taken(before, after)


class AdaptiveThreads:
    """Gives torch one thread for each core that other programs leave free, up to the number it starts with.

    Make one object for the whole run, and call `adapt()` once per training step on the thread that trains: OpenMP keeps the number
    separately for each thread. It does nothing if the number is fixed (OMP_NUM_THREADS or MKL_NUM_THREADS, set by the user or by
    `keep_to_quota`), if it starts with one thread, or if the system has no /proc/stat.
    """

    def __init__(self, *, read: Callable[[], Usage | None] = read_usage, clock: Callable[[], float] = time.monotonic):
        import torch

        self._torch, self._read, self._clock = torch, read, clock
        self.limit = torch.get_num_threads()
        fixed = self.limit == 1 or any(os.environ.get(name) for name in FIXED_BY)
        self._before = None if fixed else read()
        self._free_readings = self._bearable_readings = 0
        self._patience = PATIENCE
        self._readings_since_raised = MAX_PATIENCE

    @property
    def active(self) -> bool:
        """Whether `adapt()` may ever change the number."""
        return self._before is not None

    def adapt(self) -> str | None:
        """Sets the number of threads if it is time for a reading, and says why if that changes it."""
        if self._before is None or self._clock() - self._before.clock < INTERVAL:
            return None
        now = self._read()
        if now is None:
            return None
        taken = cores_taken(self._before, now)
        self._before = now
        threads = self._torch.get_num_threads()
        wanted = self._decide(threads, now.cores, taken)
        if wanted == threads:
            return None
        self._torch.set_num_threads(wanted)
        return f"other programs keep {taken:.1f} of {now.cores} cores busy; using {wanted} thread{'s' if wanted > 1 else ''}"

    def _decide(self, threads: int, cores: int, taken: float) -> int:
        """The number for the next steps: lower at once, higher only when the cores have been free for some readings."""
        tolerated = max(TAKEN, NOISE * math.sqrt(cores))
        lower = max(1, math.floor(cores - taken + tolerated))
        higher = min(self.limit, math.floor(cores - taken + tolerated / 2))
        self._readings_since_raised += 1
        if lower < threads:
            # If a core is lost again soon after it was gained, wait twice as long the next time.
            soon = self._readings_since_raised < 2 * self._patience
            self._patience = min(2 * self._patience, MAX_PATIENCE) if soon else PATIENCE
            self._free_readings = self._bearable_readings = 0
            return lower
        # A core that other programs use a little is worth having too, but they may want more of it: it is tried after the longest wait.
        lower = min(self.limit, lower)
        self._free_readings = self._free_readings + 1 if higher > threads else 0
        self._bearable_readings = self._bearable_readings + 1 if lower > threads else 0
        if self._free_readings < self._patience and self._bearable_readings < MAX_PATIENCE:
            return threads
        wanted = higher if self._free_readings >= self._patience else lower
        self._free_readings = self._bearable_readings = self._readings_since_raised = 0
        return wanted
