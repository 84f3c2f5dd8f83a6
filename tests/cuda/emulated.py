"""The Hopper kernels of csrc/cuda on the emulator (csrc/cuda/emulate): compiled once for what the sources are, called with CPU tensors."""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

from longvita_kernels import native

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc/cuda"
KEPT = 48  # libraries, by their last use: one run of the tests makes one, and one for each mistake that must be noticed
FLAGS = ["-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-shared", "-Wall", "-Wextra", "-DLV_EMULATE", "-x", "c++"]


class EmulatorError(RuntimeError):
    """The emulator found a kernel breaking a rule of the hardware."""


class _Tensor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "tokens", "heads", "dim", "stride_token", "stride_head")]


class _Problem(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int64), ("result", ctypes.c_int64), ("q", _Tensor), ("k", _Tensor), ("v", _Tensor),
        ("cu_q", ctypes.c_int64), ("cu_k", ctypes.c_int64), ("docs", ctypes.c_int64),
        ("scale", ctypes.c_double), ("softcap", ctypes.c_double), ("left", ctypes.c_int64), ("right", ctypes.c_int64),
    ]  # fmt: skip


def compile_library(replace=()):
    """Path of the library; `replace`: (file, old, new), what to change in a copy of the sources first, to see that tests notice."""
    files = sorted(path for path in CUDA.rglob("*") if path.is_file())
    digest = hashlib.sha256(repr((FLAGS, replace)).encode())
    for path in (*files, *sorted((ROOT / "csrc/include").rglob("*.h"))):
        digest.update(path.read_bytes())
    folder = ROOT / "build/emulated"
    library = folder / f"{digest.hexdigest()[:24]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            os.utime(library)  # in use: among the newest
        else:
            _compile(library, replace)
            _prune(folder)
    return library


def _prune(folder):
    """Deletes the libraries of sources long gone. What somebody has loaded lives on without its name; what somebody locks is left alone."""
    with open(folder / "prune", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # only one deletes, so what is listed is there
        for old in sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            with open(old.with_suffix(".lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                old.unlink()
                old.with_suffix(".lock").unlink()


def _compile(library, replace):
    source, partial = CUDA, library.with_suffix(f".{os.getpid()}.part")
    if replace:
        source = library.with_suffix(f".{os.getpid()}.src")
        shutil.copytree(CUDA, source, dirs_exist_ok=True)
        for name, old, new in replace:
            text = (source / name).read_text()
            if text.count(old) != 1:
                raise ValueError(f"{name} has {old!r} {text.count(old)} times; expected it once")
            (source / name).write_text(text.replace(old, new))
    includes = [f"-I{ROOT / 'csrc/include'}", f"-I{source}"]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *includes, "-o", partial, source / "emulate/library.cpp"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if replace:
        shutil.rmtree(source)
    if result.returncode or result.stderr:
        raise RuntimeError(f"the emulated kernels do not compile cleanly:\n{result.stderr[-4000:]}")
    os.replace(partial, library)


class Machine:
    """A loaded library. multiprocessors: blocks at a time; seed: 0, or another order of threads and copies; single_pass: how the backward
    makes dq."""

    def __init__(self, library, multiprocessors=2, seed=0, *, single_pass=True):
        self.library, self.multiprocessors, self.seed = ctypes.CDLL(str(library)), multiprocessors, seed
        self.path, self.single_pass = library, single_pass
        self.scratch = None  # of the last call, for tests that look into it
        self.library.lv_message.restype, self.library.lv_scratch.restype = ctypes.c_char_p, ctypes.c_int64

    @staticmethod
    @functools.cache
    def shared(single_pass=True):
        """The machine that most tests use."""
        return Machine(compile_library(), single_pass=single_pass)

    def start(self, readable=(), writable=()):
        """Forgets what kernels may touch, and allows them the memory of these tensors (of all that lies between their first and last
        element: what is between rows is watched by tests that compare it)."""
        self.library.lv_settings(self.multiprocessors, self.seed)
        for tensors, write in ((readable, 0), (writable, 1)):
            for tensor in tensors:
                if tensor is not None and tensor.numel():
                    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                    address, size = ctypes.c_uint64(tensor.data_ptr()), ctypes.c_int64(elements * tensor.element_size())
                    self.library.lv_allow(address, size, write)

    def check(self, code):
        message = self.library.lv_message().decode()
        if code == 1:
            raise ValueError(message)
        if code:
            raise EmulatorError(message)

    def cannot(self, *arguments, **options):
        """Why the kernels do not take a problem (arguments of `problem`), or ""."""
        self.check(self.library.lv_cannot(ctypes.byref(problem(*arguments, **options))))
        return self.library.lv_message().decode()

    def forward(self, q, k, v, cu_q, cu_k, scale, left, right, *, out=None):
        """out, lse and its rest, as longvita_kernels.triton.varlen_attention.forward gives them."""
        out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
        lse, rest = (torch.empty(q.shape[1], q.shape[0]) for _ in range(2))
        described = problem(q, k, v, cu_q, cu_k, scale, left, right, result=out.dtype)
        self.scratch = scratch = self._scratch(described, 0, 0)
        self.start((q, k, v, cu_q, cu_k), (out, lse, rest, scratch))
        code = self.library.lv_forward(
            ctypes.byref(described), ctypes.byref(_tensor(out)), *_pointers(lse, rest, scratch), ctypes.c_int64(scratch.numel())
        )
        self.check(code)
        return out, lse, rest

    def _scratch(self, described, backward, single_pass):
        """Full of NaN, read as floats."""
        return torch.full((self.library.lv_scratch(ctypes.byref(described), backward, single_pass),), 255, dtype=torch.uint8)

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, rest, cu_q, cu_k, scale, left, right, dq, dk, dv, *, add=False):
        """Writes the gradients into dq, dk and dv (None: not wanted), as longvita_kernels.triton.varlen_attention.backward does."""
        wanted = [grad for grad in (dq, dk, dv) if grad is not None]
        described = problem(q, k, v, cu_q, cu_k, scale, left, right, result=wanted[0].dtype)
        self.scratch = scratch = self._scratch(described, 1, int(self.single_pass))
        self.start((q, k, v, cu_q, cu_k, out, grad_out, lse, rest, grad_lse), (*wanted, scratch))
        strides = (ctypes.c_int64 * 4)(*lse.stride(), *((0, 0) if grad_lse is None else grad_lse.stride()))
        grads = (_Tensor * 3)(*(_Tensor() if grad is None else _tensor(grad) for grad in (dq, dk, dv)))
        code = self.library.lv_backward(
            ctypes.byref(described), ctypes.byref(_tensor(out)), ctypes.byref(_tensor(grad_out)), *_pointers(lse, rest, grad_lse),
            strides, grads, int(add), int(self.single_pass), *_pointers(scratch), ctypes.c_int64(scratch.numel()),
        )  # fmt: skip
        self.check(code)


def _tensor(x):
    return _Tensor(x.data_ptr(), *x.shape, *x.stride()[:2])


def _pointers(*tensors):
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def problem(q, k, v, cu_q, cu_k, scale, left, right, *, softcap=0.0, result=None):
    return _Problem(
        native.dtype_code(q.dtype), native.dtype_code(result or q.dtype), _tensor(q), _tensor(k), _tensor(v),
        cu_q.data_ptr(), cu_k.data_ptr(), len(cu_q) - 1, scale, softcap, left, right,
    )  # fmt: skip


class SelfTest(ctypes.Structure):
    """Arguments of a kernel of csrc/cuda/emulate/selftest.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("a", "b", "d", "n", "steps", "dtype", "a_from", "across")]


def selftest(machine, name, a, b, *, a_from=0, across=False):
    """Accumulators (128 threads, n / 2) of a self-test: A (64, 16 · steps), B (n, 16 · steps), or (16 · steps, n) with `across`."""
    n, steps = b.shape[across], a.shape[1] // 16
    d = torch.full((128, n // 2), float("nan"))
    machine.start((a, b), (d,))
    arguments = SelfTest(a.data_ptr(), b.data_ptr(), d.data_ptr(), n, steps, native.dtype_code(a.dtype), a_from, across)
    machine.check(machine.library.lv_selftest(name.encode(), ctypes.byref(arguments)))
    return d
