"""Runs attention_kernels.py and matrix_kernels.py under Triton's interpreter, each part in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install longvita[triton]")

_QUICK = "not (frozen or bfloat16 or float32)"  # accuracy in float16, and what is special about each op
each_file = pytest.mark.parametrize("file", ["attention_kernels.py", "matrix_kernels.py"])


def _run(file, selection, seed):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("LONGVITA_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--sample-seed={seed}", "-k", selection]
    command.append(str(Path(__file__).with_name(file)))
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout


@pytest.mark.timeout(1800)
@each_file
def test_kernels_are_right(sample_seed, file):
    _run(file, _QUICK, sample_seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@each_file
def test_kernels_in_every_dtype_with_each_input_frozen(sample_seed, file):
    _run(file, f"not ({_QUICK})", sample_seed)


def test_kernels_compile_for_an_h100():
    """What the interpreter does not see: types. One size of each kernel; make cuda-check compiles them all."""
    from longvita_kernels.triton import append_kv, decode_attention, merge_attention, varlen_attention

    compiled = 0
    for module in (append_kv, decode_attention, merge_attention, varlen_attention):
        for spec in module.compile_specs():
            large = any(text in spec.name for text in ("D 128", "D 256", "float16", "softcap", "fp32", "fp8"))
            if spec.capability == 90 and not large:
                ptx = spec.compile().asm["ptx"]
                assert "wgmma.mma_async" in ptx or not spec.matrix, spec.name
                compiled += 1
    assert compiled >= 8
