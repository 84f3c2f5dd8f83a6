"""Tests that need a CUDA device; without one they say so and are skipped. `--gpu-result FILE` writes what passed, per op and backend:
what an entry of `backends.VERIFIED` refers to."""

import collections
import json
import time

import pytest
import torch

_counts = collections.defaultdict(collections.Counter)


def pytest_addoption(parser):
    parser.addoption("--gpu-result", metavar="FILE", help="write passed and failed tests per op and backend as JSON")


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if item.path.parent == config.rootpath / "tests" / "gpu"]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: bench/gpu.sh test"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    parameters = getattr(item, "callspec", None)
    if "gpu" in item.keywords and parameters is not None and (report.when == "call" or report.failed):
        spec, backend = parameters.params.get("spec"), parameters.params.get("backend", "triton")
        if spec is not None:
            _counts[f"{spec.name} {backend}"][report.outcome] += 1
    return report


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("--gpu-result", default=None)
    if path is None or not torch.cuda.is_available():
        return
    from bench import machine

    result = {"machine": machine.describe("cuda"), "exit_status": int(exitstatus), "finished": time.strftime("%Y-%m-%dT%H:%M:%S")}
    with open(path, "w") as file:
        json.dump(result | {"tests": {key: dict(count) for key, count in sorted(_counts.items())}}, file, indent=1)
        file.write("\n")
