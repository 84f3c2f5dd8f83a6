"""Threads beside other programs: driven with made-up readings, so that nothing here depends on how busy the machine is."""

import os
import subprocess
import sys

import pytest
import torch

from longvita import threads
from longvita.threads import INTERVAL, SPIN_COUNT, AdaptiveThreads, Usage, cores_taken, read_usage, set_wait_policy
from tests.train.support import make_trainer


class Machine:
    """A machine on which other programs want `others` cores; each look at its clock is one interval later."""

    def __init__(self, cores: int, step: float = 1.001 * INTERVAL):
        self.cores, self.step, self.others = cores, step, 0.0
        self.now = self.busy = self.own = 0.0
        self.readings = 0

    def clock(self) -> float:
        taken = min(self.others, self.cores - 0.5)
        own = min(torch.get_num_threads(), self.cores - taken)
        self.now += self.step
        self.own += own * self.step
        self.busy += (own + taken) * self.step
        return self.now

    def read(self) -> Usage:
        self.readings += 1
        return Usage(self.cores, self.now, self.busy, self.own)

    def threads(self) -> AdaptiveThreads:
        return AdaptiveThreads(read=self.read, clock=self.clock)


@pytest.fixture(autouse=True)
def _not_fixed(monkeypatch):
    for name in threads.FIXED_BY:
        monkeypatch.delenv(name, raising=False)


def counts(adaptive: AdaptiveThreads, readings: int) -> list[int]:
    """The number of threads after each of some readings."""
    found = []
    for _ in range(readings):
        adaptive.adapt()
        found.append(torch.get_num_threads())
    return found


def test_a_thread_gives_way_at_once_and_comes_back_after_two_readings():
    torch.set_num_threads(2)
    machine = Machine(2)
    adaptive = machine.threads()
    assert counts(adaptive, 3) == [2, 2, 2]
    machine.others = 1.0
    assert adaptive.adapt() == "other programs keep 1.0 of 2 cores busy; using 1 thread"
    assert counts(adaptive, 4) == [1, 1, 1, 1]
    machine.others = 0.0
    assert adaptive.adapt() is None
    assert adaptive.adapt() == "other programs keep 0.0 of 2 cores busy; using 2 threads"
    assert counts(adaptive, 5) == [2] * 5


@pytest.mark.parametrize(("others", "expected"), [(0.0, 16), (0.2, 16), (0.5, 15), (1.0, 15), (3.0, 13), (3.6, 12), (15.5, 1)])
def test_one_thread_for_each_free_core(others, expected):
    torch.set_num_threads(16)
    machine = Machine(16)
    adaptive = machine.threads()
    machine.others = others
    assert counts(adaptive, 3) == [expected] * 3


def test_cores_that_torch_does_not_use_are_given_up_first():
    torch.set_num_threads(4)
    machine = Machine(16)
    adaptive = machine.threads()
    for others, expected in ((12.0, 4), (13.0, 3)):
        machine.others = others
        assert counts(adaptive, 2) == [expected] * 2
    machine.others = 0.0
    assert counts(adaptive, 4)[-1] == 4, "never more than it started with"


def test_a_little_load_is_no_reason_to_give_way_and_one_to_wait_longer():
    """0.2 of a core is too little to give way to. A core that was given up and is used that little is tried after the longest wait."""
    torch.set_num_threads(2)
    machine = Machine(2)
    adaptive = machine.threads()
    machine.others = 0.2
    assert counts(adaptive, 5) == [2] * 5
    machine.others = 1.0
    adaptive.adapt()
    machine.others = 0.2
    assert counts(adaptive, 20) == [1] * (threads.MAX_PATIENCE - 1) + [2] * (21 - threads.MAX_PATIENCE)


def test_a_program_that_comes_and_goes_is_not_followed_for_ever():
    """Each time it is back soon, the wait doubles, up to a limit; after a quiet time it is two readings again."""
    torch.set_num_threads(2)
    machine = Machine(2)
    adaptive = machine.threads()
    waits = []
    for _ in range(6):
        machine.others = 1.0
        assert counts(adaptive, 1) == [1]
        machine.others = 0.0
        waits.append(counts(adaptive, 20).index(2) + 1 if not waits else _wait(adaptive))
    assert waits == [2, 2, 4, 8, 16, 16]
    counts(adaptive, 40)
    machine.others = 1.0
    adaptive.adapt()
    machine.others = 0.0
    assert _wait(adaptive) == 2


def _wait(adaptive: AdaptiveThreads) -> int:
    readings = 0
    while torch.get_num_threads() == 1:
        adaptive.adapt()
        readings += 1
    return readings


def test_readings_are_half_a_second_apart():
    torch.set_num_threads(2)
    machine = Machine(2, step=INTERVAL / 10)
    adaptive = machine.threads()
    counts(adaptive, 100)
    assert 9 <= machine.readings <= 11


@pytest.mark.parametrize("name", threads.FIXED_BY)
def test_a_number_that_the_user_fixed_stays(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    torch.set_num_threads(2)
    machine = Machine(2)
    adaptive = machine.threads()
    machine.others = 1.0
    assert not adaptive.active and counts(adaptive, 3) == [2, 2, 2] and machine.readings == 0


def test_without_proc_nothing_happens(monkeypatch):
    torch.set_num_threads(2)
    adaptive = AdaptiveThreads(read=lambda: None, clock=Machine(2).clock)
    assert not adaptive.active and adaptive.adapt() is None and torch.get_num_threads() == 2


def test_cores_taken():
    before = Usage(cores=4, clock=10.0, busy=100.0, own=50.0)
    assert cores_taken(before, Usage(4, 12.0, 105.0, 53.0)) == pytest.approx(1.0)
    assert cores_taken(before, Usage(4, 12.0, 101.0, 51.1)) == 0.0, "ticks are coarse: the process may have used more than was counted"
    assert cores_taken(before, Usage(4, 12.0, 120.0, 50.0)) == 4.0
    assert cores_taken(before, before) == 0.0


def test_cores_that_are_numbered_otherwise_are_not_read(monkeypatch):
    """lxcfs shows the cores of a container as cpu0, cpu1, … whatever their numbers are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4096})
    assert read_usage() is None


def test_a_reading_of_this_machine():
    first = read_usage()
    if first is None:  # a machine whose /proc/stat does not tell its cores apart: then nothing may adapt
        assert not AdaptiveThreads().active
        return
    sum(range(2_000_000))
    second = read_usage()
    assert first.cores == len(os.sched_getaffinity(0))
    assert second.clock > first.clock and second.busy >= first.busy and second.own > first.own


def test_the_wait_policy_is_set_before_torch_and_only_if_the_user_sets_none(monkeypatch):
    environment = {}
    set_wait_policy(environment)
    assert environment == {}, "torch is loaded here, so it would be too late"
    monkeypatch.delitem(sys.modules, "torch")
    set_wait_policy(environment)
    assert environment == {"GOMP_SPINCOUNT": str(SPIN_COUNT)}
    for chosen in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}):
        environment = dict(chosen)
        set_wait_policy(environment)
        assert environment == chosen


def control_groups(directory, groups: str, limits: dict[str, str]) -> dict:
    """The two places that tell a process its limits, with these contents."""
    (directory / "cgroup").write_text(groups, encoding="utf-8")
    for name, text in limits.items():
        path = directory / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return {"groups": directory / "cgroup", "mount": directory / "fs"}


@pytest.mark.parametrize(
    ("groups", "limits", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "50000 100000"}, 0.5),
        ("0::/only/the/host/sees/this\n", {"cpu.max": "200000 100000"}, 2.0),
        ("3:cpu,cpuacct:/box\n1:cpuset:/\n", {"cpu/box/cpu.cfs_quota_us": "300000", "cpu/box/cpu.cfs_period_us": "100000"}, 3.0),
        ("2:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:cpuset:/\n", {"cpu.max": "50000 100000"}, None),
        ("0::/user.slice/büro\n", {"user.slice/büro/cpu.max": "what", "cpu.max": "100000 100000"}, 1.0),
    ],
)
def test_the_quota_of_control_groups(tmp_path, groups, limits, quota):
    assert threads.core_quota(**control_groups(tmp_path, groups, limits)) == quota


def test_no_quota_without_control_groups(tmp_path):
    assert threads.core_quota(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(("quota", "number"), [(None, None), (0.5, "1"), (1.2, "2"), (8.0, None)])
def test_as_many_threads_as_the_quota_pays_for(monkeypatch, quota, number):
    monkeypatch.setattr(threads, "core_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delitem(sys.modules, "torch")
    environment = {}
    threads.keep_to_quota(environment)
    assert environment.get("OMP_NUM_THREADS") == number
    environment = {"MKL_NUM_THREADS": "6"}
    threads.keep_to_quota(environment)
    assert environment == {"MKL_NUM_THREADS": "6"}, "the user's choice stays"


def test_the_command_line_sets_it_for_itself_and_its_children():
    code = "import os; from longvita.cli import main; main(['--version']); print(os.environ['GOMP_SPINCOUNT'])"
    clean = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=True)
    assert done.stdout.split()[-1] == str(SPIN_COUNT)


def test_the_trainer_says_when_the_number_changes(tmp_path, capsys):
    torch.set_num_threads(2)
    machine = Machine(2)
    adaptive = machine.threads()

    def on_step(step, row):
        machine.others = 1.0 if step >= 2 else 0.0
        seen.append(row["threads"])

    seen = []
    make_trainer(tmp_path, steps=4, progress="lines", on_step=on_step, threads=adaptive).train()
    assert "other programs keep 1.0 of 2 cores busy; using 1 thread from step 3\n" in capsys.readouterr().err
    assert seen == [2, 2, 1, 1]
