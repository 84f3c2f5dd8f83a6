"""What tests/gpu leaves of a run, also of one that ends before its time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import machine, verified
from tests.gpu import conftest as gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("nodeid", "subject"),
    [
        ("tests/gpu/test_kernels.py::test_x[append_kv-cuda-bfloat16-int8 rows, two-sided]", "append_kv cuda"),
        ("tests/gpu/test_attention.py::test_x[300-varlen_attention-triton]", "varlen_attention triton"),
        ("tests/gpu/test_kernels.py::test_x[append_kv]", None),
        ("tests/gpu/test_model.py::test_kernels_do_not_change_training", None),
    ],
)
def test_subjects(nodeid, subject):
    assert gpu.subject(nodeid) == subject


_TESTS = """
import time, pytest
each = pytest.mark.parametrize("name", ["merge_attention-triton", "append_kv-triton", "masked_lm_head-triton", "append_kv-cuda"])

@each
def test_runs(name):
    if name == "append_kv-triton":
        assert False, "off by 5 %"
    if name == "masked_lm_head-triton":
        time.sleep(600)

@each
def test_runs_too(name):
    pass
"""
_CONFTEST = """
from pathlib import Path
import torch
from tests.gpu import conftest as gpu
from tests.gpu.conftest import pytest_addoption

def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(gpu.Worker())
    else:
        config.pluginmanager.register(gpu.Result(Path(config.getoption("--gpu-result"))))

def synchronize():
    raise RuntimeError("an illegal memory access was encountered")

gpu.machine.describe = lambda device: {"architecture": "sm_90"}
torch.cuda.synchronize = synchronize
"""


def _run(folder, *options):
    (folder / "conftest.py").write_text(_CONFTEST)
    (folder / "test_gpu.py").write_text(_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--gpu-result", "result.json", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    return json.loads((folder / "result.json").read_text()), done.stdout


def test_a_lost_context_and_a_test_that_hangs_cost_no_other_test(tmp_path):
    result, said = _run(tmp_path, "-n", "1", "--max-worker-restart", "9", "--timeout", "15", "--timeout-method", "thread")
    assert result["tests"] == {
        "append_kv cuda": {"passed": 2},
        "append_kv triton": {"failed": 1, "passed": 1},
        "masked_lm_head triton": {"failed": 1, "passed": 1},
        "merge_attention triton": {"passed": 2},
    }, said
    failures = {gpu.subject(nodeid): why for nodeid, why in result["failures"].items()}
    assert "off by 5 %" in failures["append_kv triton"] and "crashed" in failures["masked_lm_head triton"]
    assert verified.passed(result, "merge_attention", "triton") and not verified.passed(result, "append_kv", "triton")


def test_what_a_run_did_not_come_to_is_not_verified(tmp_path):
    result, said = _run(tmp_path, "--exitfirst", "-k", "not masked")
    assert result["exit_status"] == 1 and result["tests"]["append_kv cuda"] == {"not run": 2}, said
    assert result["tests"]["merge_attention triton"] == {"passed": 1, "not run": 1}
    assert not verified.passed(result, "merge_attention", "triton")


_PYTHON = """#!/bin/bash
case "$*" in
  *get_device_name*) echo h200 ;;
  *native_cuda.load*) echo cuda ;;
  *masked_lm_head*cuda-h200*) echo "ran $*"; exit 3 ;;
  *decode_attention*) exec sleep 600 ;;
  *) echo "ran $*" ;;
esac
"""


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    """bench/gpu.sh, with an interpreter that only says what it was called with."""
    (tmp_path / "python").write_text(_PYTHON)
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), "LIMIT": "10"}
    command = [str(ROOT / "bench" / "gpu.sh"), "head", "decode", "projector"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    ran = [line.split()[3:5] for line in done.stdout.splitlines() if line.startswith("ran -m bench")]
    assert [op for op, _ in ran] == ["linear_cross_entropy", "masked_lm_head", "masked_lm_head", "pixel_shuffle_projection"]
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert done.returncode == 1 and len(failed) == 2
    assert failed[0].startswith("FAILED head: exit status 3: ") and failed[1].startswith("FAILED decode: exit status 124, out of time: ")
    done = subprocess.run([command[0], "nonsense"], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2 and "unknown part nonsense; expected some of build smoke test" in done.stderr


def test_a_copy_of_the_tree_without_its_history_has_a_commit(monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    assert machine.describe()["commit"] == "abc1234"
    monkeypatch.delenv("BENCH_COMMIT")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.describe()["commit"] == ""
