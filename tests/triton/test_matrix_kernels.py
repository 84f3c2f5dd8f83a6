"""Runs matrix_kernels.py under Triton's interpreter, each part in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install longvita[triton]")

_QUICK = "not (frozen or bfloat16 or float32)"  # accuracy in float16, and what is special about each op


def _run(selection):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("LONGVITA_BACKEND", None)
    file = Path(__file__).with_name("matrix_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, str(file)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout


def test_matrix_kernels_are_right():
    _run(_QUICK)


@pytest.mark.slow
def test_matrix_kernels_in_every_dtype_with_each_input_frozen():
    _run(f"not ({_QUICK})")
