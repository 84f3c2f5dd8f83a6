"""The compiled part: one OpenMP runtime, instruction sets, what is said when it is missing, a build that cannot work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longvita_kernels import native

ROOT = Path(__file__).resolve().parents[1]


def python(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=500)


def output(code, *arguments, **environment):
    result = python(code, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_it_is_built_and_runs_here():
    assert native.why_missing() is None
    assert native.built_isas()["portable"] is True
    assert native.built_isas()[native.isa()] is True


def test_one_openmp_runtime_in_the_process():
    """Ours and torch's parallel regions both ran, and one runtime is mapped: the one torch brought."""
    code = """
import re, torch
from longvita_kernels import native, varlen_attention
torch.set_num_threads(2)
q = torch.randn(600, 2, 32)
varlen_attention(q, q, q, torch.tensor([0, 600], dtype=torch.int32))
torch.mm(torch.randn(300, 300), torch.randn(300, 300))
assert native.why_missing() is None
print(len({line.split()[-1] for line in open("/proc/self/maps") if re.search(r"/lib(g|i)?omp[^/]*[.]so", line)}))
"""
    assert output(code) == "1"


def test_torchs_openmp_runtime_is_preferred_whatever_the_memory_map():
    others = ["/s/scikit_learn.libs/libgomp-e9.so.1.0.0", "/s/x/libcompress.so"]
    torchs = ["/s/torch/lib/libgomp.so.1", "/s/torch.libs/libiomp5.so"]
    for own in torchs:
        assert native._torchs_runtime_first([*others, own]) == [own, others[0]]


@pytest.mark.parametrize("order", ["sklearn.utils._openmp_helpers, torch", "torch, sklearn.utils._openmp_helpers"])
def test_torchs_openmp_runtime_is_taken_when_another_is_there(order):
    """scikit-learn's wheel brings its own libgomp; what _native resolves (the global scope) is still what libtorch_cpu calls."""
    pytest.importorskip("sklearn")
    code = """
import ctypes, pathlib
from longvita_kernels import backends, native, varlen_attention
torch.set_num_threads(3)
q, offsets = torch.randn(600, 2, 32), torch.tensor([0, 600], dtype=torch.int32)
with backends.use("native"):
    out = varlen_attention(q, q, q, offsets)
with backends.use("reference"):
    torch.testing.assert_close(out, varlen_attention(q, q, q, offsets), rtol=1e-4, atol=1e-5)
seen_by_native, torchs = ctypes.CDLL(None), ctypes.CDLL(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_max_threads"):
    addresses = {ctypes.cast(getattr(library, name), ctypes.c_void_p).value for library in (seen_by_native, torchs)}
    assert len(addresses) == 1, name
print(seen_by_native.omp_get_max_threads())
"""
    assert output(f"import {order}{code}") == "3"


def test_the_library_names_no_runtime_and_no_build_directory():
    binary = Path(native.load().__file__).read_bytes()
    assert b"libgomp" not in binary and str(ROOT / "csrc").encode() not in binary


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16"])
def test_instruction_set_is_capped(isa):
    order = ["portable", "avx2", "avx512", "avx512bf16"]
    used = output("from longvita_kernels import native; print(native.isa())", LONGVITA_ISA=isa)
    runs = [name for name in order[: order.index(isa) + 1] if native.built_isas().get(name)]
    assert used == runs[-1]


def test_unknown_instruction_set_is_refused():
    result = python("from longvita_kernels import native; native.load()", LONGVITA_ISA="sse9")
    assert result.returncode != 0
    assert "LONGVITA_ISA: expected portable, avx2, avx512, avx512bf16 or emulated, got 'sse9'" in result.stderr


_ARITHMETIC = """
import torch
from longvita_kernels import native
kernels, generator = native.load(), torch.Generator().manual_seed(0)

def apply(function, x, *more):
    y = torch.empty_like(x)
    function(x.data_ptr(), y.data_ptr(), x.numel(), *more)
    return y

special = torch.tensor([0.0, -float("inf"), float("nan"), -200.0, 1.0, -1.0])
x = torch.cat([torch.rand(20001, generator=generator) * -126, torch.rand(1001, generator=generator) * 100, special])
y, exact = apply(kernels.simd_exp2, x), torch.exp2(x.double())
assert ((y - exact) / exact)[:-6].abs().max() < 1.5e-7
assert torch.equal(y[-6:].nan_to_num(7.0), torch.tensor([1.0, 0.0, 7.0, 0.0, 2.0, 0.5])), y[-6:]

x = torch.randn(20001, generator=generator) * torch.logspace(-6, 1.3, 20001)
y, exact = apply(kernels.simd_tanh, x), torch.tanh(x.double())
assert ((y - exact) / exact).abs().max() < 3e-7
special = apply(kernels.simd_tanh, torch.tensor([0.0, float("inf"), -float("inf"), float("nan")]))
assert torch.equal(special.nan_to_num(7.0), torch.tensor([0.0, 1.0, -1.0, 7.0])), special

for dtype in (torch.bfloat16, torch.float16):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()      # all values of the type, and what lies between
    near = torch.cat([every, torch.nextafter(every, torch.tensor(0.0)), every * 1.00048828125, torch.randn(9999, generator=generator)])
    y, exact = apply(kernels.simd_round_trip, near, native.dtype_code(dtype)), near.to(dtype).float()
    right = (y == exact) | (y.isnan() & exact.isnan())
    if native.isa() == "avx512bf16" and dtype == torch.bfloat16:      # its instruction takes denormals as 0
        right |= (y == 0) & (near.abs() < torch.finfo(torch.float32).tiny)
    assert bool(right.all()), (dtype, near[~right][:5])
print(native.isa(), kernels.lanes())
"""


@pytest.mark.parametrize("isa", sorted(name for name, runs in native.built_isas().items() if runs) if native.load() else [])
def test_vector_arithmetic(isa):
    lanes = {"portable": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16, "emulated": 16}[isa]
    assert output(_ARITHMETIC, LONGVITA_ISA=isa) == f"{isa} {lanes}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sixteen_lanes_and_bf16_pairs_emulated(sample_seed, dtype):
    """The packing and loops of the AVX-512 paths, run in AVX2: accurate by the rule, over every sample of varlen_attention."""
    if not native.built_isas().get("emulated"):
        assert native.built_isas() == {"portable": True}
        return
    code = """
import sys, torch
from longvita_kernels import native, testing
from longvita_kernels.ops import varlen_attention as module
for draws in testing.pools(module.SPEC, getattr(torch, sys.argv[1]), "cpu", int(sys.argv[2])):
    testing.check_sample(module.SPEC, draws)
print(native.isa())
"""
    assert output(code, dtype, str(sample_seed), LONGVITA_ISA="emulated") == "emulated"


def test_missing_library_says_what_to_do_and_the_reference_runs():
    code = """
import sys, warnings
sys.modules["longvita_kernels._native"] = None      # what an import of a library that was not built amounts to
import torch
from longvita_kernels import backends, native, varlen_attention
assert native.load() is None and "native" not in backends.available()
q = torch.randn(5, 1, 32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        varlen_attention(q, q, q, torch.tensor([0, 5], dtype=torch.int32))
print(len(caught), native.why_missing(), sep="|")
"""
    warnings, reason = output(code).split("|")
    assert warnings == "1"
    assert "were not built" in reason and "python setup.py build_ext --inplace" in reason


def test_a_build_without_compiler_fails_and_names_the_way_out(tmp_path):
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "CXX": str(tmp_path / "no-such-compiler")}, timeout=500,
    )  # fmt: skip
    assert result.returncode != 0
    assert "the native kernels could not be built" in result.stderr and "LONGVITA_NATIVE=0" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_pure_python_build_on_request(tmp_path):
    subprocess.run([sys.executable, "setup.py", "-q", "build", f"--build-base={tmp_path}"], cwd=ROOT, check=True, capture_output=True,
                   env={**os.environ, "LONGVITA_NATIVE": "0"}, timeout=500)  # fmt: skip
    built = {path.name for path in tmp_path.rglob("longvita_kernels/*")}
    assert "native.py" in built and not any(name.startswith("_native") for name in built)
