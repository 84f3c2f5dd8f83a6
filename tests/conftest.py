"""Shared by all tests: one seed (`--sample-seed`), few threads, no backend request left over from another test."""

import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that reads it: tests use no network

import pytest
import torch

START = time.time()


@pytest.fixture(scope="session")
def sample_seed(request):
    """The seed that the samples of ops are drawn from."""
    return request.config.getoption("--sample-seed")


@pytest.fixture(autouse=True)
def _same_start(sample_seed):
    """Every test begins with the same random state and thread count and leaves the backend choice as it found it."""
    from longvita_kernels import backends

    before, threads = backends.requested(), torch.get_num_threads()
    torch.manual_seed(sample_seed)
    yield
    torch.set_num_threads(threads)
    backends.use(before or "auto")


def pytest_addoption(parser):
    parser.addoption("--sample-seed", type=int, default=0, metavar="N", help="draw the samples of ops from this seed (default 0)")
    parser.addoption("--result", metavar="FILE", help="write what was run, where, and how it ended (for tests/RESULTS.md)")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """--result: a short report, from the process that sees all workers' results."""
    path = config.getoption("--result")
    if path is None or hasattr(config, "workerinput"):  # a worker knows its own tests only
        return
    import platform
    import subprocess

    from longvita_kernels import native

    def output(*command):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    stats = terminalreporter.stats
    ran = [report for outcome in ("passed", "failed", "error", "skipped") for report in stats.get(outcome, [])]
    calls = sorted((r for r in ran if r.when == "call"), key=lambda r: -r.duration)
    slow, quick = ([r for r in calls if ("slow" in r.keywords) == wanted] for wanted in (True, False))
    counts = ", ".join(f"{len(stats[key])} {key}" for key in ("passed", "failed", "error", "skipped", "xfailed") if stats.get(key))
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    cpu_facts = f"{cpu}, {len(os.sched_getaffinity(0))} cores; instruction sets {', '.join(k for k, v in native.built_isas().items() if v)}"
    lines = [
        "# The last run of `make test-all`",
        "",
        f"{time.strftime('%Y-%m-%d')}, commit {output('git', 'describe', '--always', '--dirty')}: **{counts}**, "
        f"exit status {int(exitstatus)}, {time.time() - START:.0f} s.",
        f"{cpu_facts}; Python {platform.python_version()}, torch {torch.__version__}.",
        "",
        "What `make test` leaves out, and the slowest of the rest:",
        "",
        "| test | outcome | seconds |",
        "|---|---|---|",
        *(f"| {r.nodeid} | {r.outcome} | {r.duration:.0f} |" for r in [*slow, *quick[:8]]),
        "",
    ]
    with open(path, "w") as file:
        file.write("\n".join(lines))
