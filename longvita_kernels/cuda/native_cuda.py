"""The compiled CUDA kernels: loading them, saying why when that fails, and calling them on a tensor's device and torch's stream there.

`load()` returns the extension module `_native_cuda` or None; `why_missing()` then says why. Loading does not start the driver. Where CUDA
kernels run on the CPU (`emulated()`), a device of type "cpu" stands for a GPU.

LONGVITA_CUDA_EMULATED=FILE loads that library instead: the same code compiled for the CPU, which takes CPU tensors (tests/cuda/ builds it).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NAME = "longvita_kernels._native_cuda"
_REMEDY = (
    "install with nvcc (CUDA 12.8 or later) present: LONGVITA_CUDA=1 pip install --force-reinstall --no-deps ., or build in place: "
    "LONGVITA_CUDA=1 python setup.py build_ext --inplace"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    emulated = os.environ.get("LONGVITA_CUDA_EMULATED")
    try:
        module = _from_file(emulated) if emulated else importlib.import_module(_NAME)
    except ModuleNotFoundError:
        return None, f"the CUDA kernels were not built (longvita_kernels/_native_cuda is not there); {_REMEDY}"
    except ImportError as error:
        return None, f"the CUDA kernels do not load: {error}; {_REMEDY}"
    why = module.cannot_run()
    return (None, f"the CUDA kernels cannot run: {why}") if why else (module, None)


def _from_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"LONGVITA_CUDA_EMULATED is {path!r}, which is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load() -> ModuleType | None:
    """The extension module, or None (see why_missing)."""
    return _load()[0]


def why_missing() -> str | None:
    """One sentence that says why load() gives None and what to do, or None when the CUDA kernels are there and can run."""
    return _load()[1]


def emulated() -> bool:
    """Whether the kernels run on the CPU, for tests."""
    return bool(os.environ.get("LONGVITA_CUDA_EMULATED")) and load() is not None and load().emulated


def current(device: torch.device) -> AbstractContextManager:
    """A block in which `device` is the current one."""
    import torch

    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def stream(device: torch.device) -> int:
    """torch's stream on `device`, as the extension takes it."""
    import torch

    return 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream


def call(name: str, device: torch.device, *arguments: object) -> object:
    """The extension's function `name` with these arguments and, last, torch's stream on `device`; that device is current meanwhile."""
    with current(device):
        return getattr(load(), name)(*arguments, stream(device))
