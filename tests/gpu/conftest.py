"""Tests that need a CUDA device; without one they say so and are skipped. A test that has an op and a backend among its parameters runs on
that backend.

`--gpu-result FILE` keeps what passed, per op and backend: what an entry of `backends.VERIFIED` refers to. It is written while tests run, so
a run that is cut off leaves what it knows; what it did not come to is counted as "not run".

With pytest-xdist (-n 8) kernels are compiled side by side, and none takes others with it: a worker whose CUDA context is lost, or that
hangs until --timeout, ends, and xdist starts a new one.
"""

import collections
import functools
import os
import re
import time
from pathlib import Path

import pytest
import torch

from bench import machine, report
from longvita_kernels import backends
from longvita_kernels.cuda import native_cuda
from longvita_kernels.cuda import varlen_attention as cuda_attention
from longvita_kernels.spec import all_specs


def pytest_addoption(parser):
    parser.addoption("--gpu-result", metavar="FILE", help="write passed and failed tests per op and backend as JSON")


def pytest_configure(config):
    if not torch.cuda.is_available():
        return
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker())
    elif config.getoption("--gpu-result", default=None):
        config.pluginmanager.register(Result(Path(config.getoption("--gpu-result"))))


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if item.path.parent == config.rootpath / "tests" / "gpu"]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: bench/gpu.sh test"))


@pytest.fixture
def either_backward(request, monkeypatch):
    """Sets up to which scratch CUDA C++ makes dq in the same pass as dk and dv; None: as it is."""
    if request.param is not None:
        monkeypatch.setattr(cuda_attention, "SINGLE_PASS_BYTES", request.param)


@pytest.fixture(autouse=True)
def _no_tf32():
    """float32 means float32, for the composition that bounds the errors as well."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _in_use(request):
    parameters = getattr(request.node, "callspec", None)
    backend = parameters and parameters.params.get("backend")
    if backend is None:
        yield
        return
    if backend == "cuda" and native_cuda.load() is None:
        pytest.skip(native_cuda.why_missing())
    if backend == "cuda" and parameters.params["spec"].name == "varlen_attention" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are for compute capability 9.0")
    with backends.use(backend):
        yield
    if torch.cuda.memory_reserved() > 2 << 30:  # other processes may need it
        torch.cuda.empty_cache()


class Worker:
    """Of several processes one that runs tests."""

    def __init__(self):
        self.lost = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed:
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # after an access out of bounds no call of this process succeeds
                self.lost = True
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self):
        if self.lost:  # the report has been sent
            os._exit(1)


@functools.cache
def subject(nodeid):
    """ "op backend" of a test whose parameters name both, or None. The name alone tells: of a process that died there is nothing else."""
    words = re.split(r"[\[\]-]", nodeid)
    op, backend = (next((word for word in words if word in names), None) for names in (all_specs(), backends.NAMES))
    return f"{op} {backend}" if op and backend else None


class Result:
    """The file of --gpu-result."""

    def __init__(self, path):
        self.path, self.machine = path, machine.describe("cuda")
        self.planned, self.outcomes, self.failures, self.written = [], {}, {}, 0.0

    def pytest_collection_finish(self, session):
        self.planned = [item.nodeid for item in session.items]

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.planned = list(ids)

    def pytest_runtest_logreport(self, report):
        if (report.when == "call" or not report.passed) and self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures.setdefault(report.nodeid, (crash.message if crash else str(report.longrepr))[:1000])
        if time.monotonic() > self.written + 2:
            self.write(None)

    def pytest_sessionfinish(self, session, exitstatus):
        self.write(int(exitstatus))

    def write(self, exit_status):
        tests = collections.defaultdict(collections.Counter)
        for nodeid in self.planned:
            if subject(nodeid):
                tests[subject(nodeid)][self.outcomes.get(nodeid, "not run")] += 1
        result = {"machine": self.machine, "exit_status": exit_status, "finished": time.strftime("%Y-%m-%dT%H:%M:%S")}
        counts = {key: dict(count) for key, count in sorted(tests.items())}
        report.write_json(self.path, result | {"tests": counts, "failures": self.failures})
        self.written = time.monotonic()
