"""The CUDA C++ part on a machine without a GPU: its kernels compiled for the CPU, and what is said where it is missing or cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longvita_kernels import backends
from longvita_kernels.cuda import native_cuda
from tests.cuda import on_cpu

ROOT = Path(__file__).parents[2]


def _python(*arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    environment.pop("LONGVITA_BACKEND", None)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_kernels_are_right(sample_seed):
    done = _python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--sample-seed={sample_seed}",
        str(Path(__file__).with_name("cuda_kernels.py")),
        LONGVITA_CUDA_EMULATED=str(on_cpu.build()),
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout


@pytest.mark.dist
def test_the_ring_over_peer_copies(tmp_path):
    """Real processes, and copies that read the memory of another: messages, offsets, answers, events used again."""
    done = _python("-m", "tests.cuda.peers", str(tmp_path), "3", "cpu", LONGVITA_CUDA_EMULATED=str(on_cpu.build()))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def missing(monkeypatch):
    """As where the extension was never built."""
    monkeypatch.setitem(sys.modules, "longvita_kernels._native_cuda", None)
    native_cuda._load.cache_clear()
    yield
    native_cuda._load.cache_clear()


def test_a_library_that_is_not_there_is_named_with_the_remedy(missing):
    assert native_cuda.load() is None and "cuda" not in backends.available()
    with pytest.raises(RuntimeError, match="'cuda' was requested but cannot be used: the CUDA kernels were not built .*LONGVITA_CUDA=1"):
        backends.use("cuda")


def test_a_machine_that_cannot_run_it_is_told_why(monkeypatch):
    class Module:
        @staticmethod
        def cannot_run():
            return "there is no NVIDIA driver on this machine"

    monkeypatch.setitem(sys.modules, "longvita_kernels._native_cuda", Module)
    native_cuda._load.cache_clear()
    try:
        assert native_cuda.why_missing() == "the CUDA kernels cannot run: there is no NVIDIA driver on this machine"
    finally:
        native_cuda._load.cache_clear()


class _OnGpu:
    """What a choice looks at in a tensor on a GPU."""

    device, is_cpu, dtype = torch.device("cuda", 0), False, torch.bfloat16


@pytest.fixture
def h100(monkeypatch):
    """A machine with an H100 and everything installed."""
    monkeypatch.setattr(backends, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(backends, "_not_installed", lambda name: None)
    monkeypatch.setattr(backends, "_native_lacks", lambda op, backend="native": None)
    monkeypatch.setattr(native_cuda, "why_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "VERIFIED", {})
    backends._warn_once.cache_clear()
    return backends.VERIFIED


def test_a_kernel_that_never_ran_on_hardware_is_no_default(h100):
    with pytest.warns(RuntimeWarning, match="no kernel is verified on sm_90"):
        assert backends.choose("merge_attention", _OnGpu()) == "torch"
    with backends.use("cuda"):
        assert backends.choose("merge_attention", _OnGpu()) == "cuda"
        assert backends._decide("merge_attention", _OnGpu(), None)[1] == "requested; not verified on sm_90"


def test_a_call_that_the_kernel_does_not_take_goes_to_the_next(h100, recwarn):
    ours, triton = (backends.Verified(name, f"bench/results/{name}.json") for name in ("cuda", "triton"))
    h100["varlen_attention", "sm_90"] = (ours, triton)
    assert backends.choose("varlen_attention", _OnGpu(), None, lambda: None) == "cuda"
    assert backends.choose("varlen_attention", _OnGpu(), None, lambda: "no such head dimension") == "triton"
    assert not recwarn.list
    with backends.use("cuda"), pytest.raises(RuntimeError, match="'cuda' was requested but cannot run varlen_attention: no such head dim"):
        backends.choose("varlen_attention", _OnGpu(), None, lambda: "no such head dimension")


def test_a_request_concerns_the_ops_that_it_has(h100):
    h100["append_kv", "sm_90"] = (backends.Verified("triton", "bench/results/x.json"),)
    with backends.use("cuda"):
        assert backends.choose("append_kv", _OnGpu()) == "triton"
        assert backends.choose("append_kv", torch.zeros(1)) == "native"
        with pytest.raises(RuntimeError, match="cuda runs on CUDA tensors, not on device 'cpu'"):
            backends.choose("merge_attention", torch.zeros(1))


def test_importing_the_package_imports_no_gpu_part():
    code = "import sys, longvita_kernels; print([name for name in sys.modules if 'triton' in name or 'cuda' in name])"
    assert _python("-c", code).stdout.strip() == "[]"


def _setup(wanted, nvcc, gpu):
    """What setup.py would build with LONGVITA_CUDA=`wanted`, or its message, on a machine with or without nvcc and a GPU."""
    code = f"""
import pathlib, runpy, setuptools, shutil
shutil.which = lambda name, **_: {nvcc} and name
pathlib.Path.glob = lambda self, pattern: ["nvidia0"] if {gpu} else []
pathlib.Path.exists = lambda self: False
setuptools.setup = lambda ext_modules, cmdclass: print([ext.name for ext in ext_modules])
runpy.run_path("setup.py")
"""
    done = _python("-c", code, LONGVITA_CUDA=wanted)
    return done.stdout.strip() or done.stderr.strip()


def test_what_is_built():
    both, cpu = "['longvita_kernels._native', 'longvita_kernels._native_cuda']", "['longvita_kernels._native']"
    assert _setup("auto", nvcc=True, gpu=True) == both
    assert _setup("auto", nvcc=True, gpu=False) == cpu == _setup("auto", nvcc=False, gpu=True)
    assert _setup("1", nvcc=True, gpu=False) == both
    assert _setup("0", nvcc=True, gpu=True) == cpu
    assert "LONGVITA_CUDA=1, but nvcc was not found. Put CUDA's bin folder on the PATH" in _setup("1", nvcc=False, gpu=True)
    assert "LONGVITA_CUDA is 'yes'; expected auto, 0 or 1" in _setup("yes", nvcc=True, gpu=True)
