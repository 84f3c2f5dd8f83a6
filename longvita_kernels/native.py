"""The compiled kernels: loading them, and saying why when that fails.

`load()` returns the extension module `_native` or None; `why_missing()` then says why. Nothing here imports torch until it is asked to
load, and torch always comes before the extension: its OpenMP runtime must be the one that serves both.

LONGVITA_ISA=portable|avx2|avx512|avx512bf16 caps the instruction set (read once, before the first call); `emulated` runs the code of
avx512bf16 in AVX2 instructions, for tests.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import re
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Codes of csrc/include/longvita/dtype.h.
_DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "float8_e4m3fn": 4, "int32": 5, "int64": 6}
_REMEDY = (
    "reinstall with a C++17 compiler present (pip install --force-reinstall --no-deps .), or build in place: "
    "python setup.py build_ext --inplace"
)


def _torchs_runtime_first(paths: list[str]) -> list[str]:
    """The OpenMP runtimes among mapped files, those in torch/lib or torch.libs first: scikit-learn, say, may have brought its own."""
    runtimes = [path for path in paths if re.search(r"/lib(g|i)?omp[^/]*\.so", path)]
    return sorted(runtimes, key=lambda path: ("/torch" not in path, "/libgomp" not in path))


def _share_openmp_runtime() -> None:
    """Makes the OpenMP runtime that torch has loaded visible to _native, which names none itself (wheels call that file differently)."""
    with open("/proc/self/maps") as maps:
        paths = [line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "omp" in line]
    runtimes = _torchs_runtime_first(paths)
    ctypes.CDLL(runtimes[0] if runtimes else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # none mapped: a torch built without OpenMP


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    import torch  # noqa: F401  (brings its OpenMP runtime)

    try:
        _share_openmp_runtime()
        module = importlib.import_module("longvita_kernels._native")
        module.isa()
    except ModuleNotFoundError:
        return None, f"the native kernels were not built (longvita_kernels/_native is not there); {_REMEDY}"
    except (ImportError, OSError) as error:
        return None, f"the native kernels do not load: {error}; {_REMEDY}"
    return module, None


def load() -> ModuleType | None:
    """The extension module, or None (see why_missing). ValueError when LONGVITA_ISA names no instruction set."""
    return _load()[0]


def why_missing() -> str | None:
    """One sentence that says why load() gives None and what to do, or None when the native kernels are there."""
    return _load()[1]


def _require() -> ModuleType:
    module = load()
    if module is None:
        raise RuntimeError(why_missing())
    return module


def isa() -> str:
    """The instruction set in use: 'portable', 'avx2', 'avx512' or 'avx512bf16' ('emulated' on request)."""
    return _require().isa()


def built_isas() -> dict[str, bool]:
    """Instruction sets in this build, and whether this machine can run each."""
    return _require().built_isas()


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """The number that csrc/ knows a torch dtype by."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPE_CODES:
        raise ValueError(f"expected a dtype among {', '.join(_DTYPE_CODES)}, got {name}; convert the tensor first")
    return _DTYPE_CODES[name]


def isa_cap() -> str | None:
    """LONGVITA_ISA as set, for reports."""
    return os.environ.get("LONGVITA_ISA") or None
