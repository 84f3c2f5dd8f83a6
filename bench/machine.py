"""What machine this is, and its ceilings."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from bench.harness import interleave, once
from longvita_kernels import backends, memory, native

MM_SIZES = (4096, 1024)  # the second where the first would take longer than MM_SECONDS: bf16 on a CPU that has no such instruction
MM_SECONDS = 5.0
CUDA_MM_SIZE = 8192
READ_BYTES = 1 << 30  # far beyond any cache


def describe(device: str = "cpu") -> dict:
    """Machine, versions and commit, for the head of a result."""
    with open("/proc/cpuinfo") as f:
        cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in f)}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu.get("flags", "").split()]
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "flags": flags,
        "isa": native.isa() if native.load() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "backend": backends.requested() or "auto",
    }
    return about | _describe_gpu() if device == "cuda" else about


def _commit() -> str:
    """BENCH_COMMIT, for a copy of the tree that lacks its history, or what git says."""
    if "BENCH_COMMIT" in os.environ or shutil.which("git") is None:
        return os.environ.get("BENCH_COMMIT", "")
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return git.stdout.strip()


def _describe_gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    versions = {name: importlib.metadata.version(name) for name in ("triton", "flash-attn") if _installed(name)}
    return {
        "gpu": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "cuda": torch.version.cuda,
        **versions,
    }


def _installed(name):
    return importlib.util.find_spec(name.replace("-", "_")) is not None


def mm(dtype: torch.dtype, device: str = "cpu") -> tuple[Callable[[], object], int]:
    """torch.mm of size³ in a dtype: the call, and its FLOPs."""
    if device == "cuda":
        with torch.device(device):
            return _square(CUDA_MM_SIZE, dtype), 2 * CUDA_MM_SIZE**3
    large, small = (_square(size, dtype) for size in MM_SIZES)
    small()
    return (large, 2 * MM_SIZES[0] ** 3) if once(small) * (MM_SIZES[0] / MM_SIZES[1]) ** 3 < MM_SECONDS else (small, 2 * MM_SIZES[1] ** 3)


def _square(size, dtype):
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def read(device: str = "cpu") -> tuple[Callable[[], object], int]:
    """Reading memory with all threads: the call, and its bytes. On a GPU a copy, what is read and what is written counted."""
    if device == "cuda":
        source, target = (torch.zeros(READ_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
        return lambda: target.copy_(source), 2 * READ_BYTES
    data, module, threads = memory.empty(READ_BYTES, dtype=torch.uint8).zero_(), native.load(), torch.get_num_threads()
    size = READ_BYTES // (64 * threads) * (64 * threads)
    return lambda: (module.machine_read(data.data_ptr(), size, threads), data), size


def register_peak(pairs: bool) -> tuple[Callable[[], object], int]:
    """Multiply-adds that never leave the registers: fp32, or pairs of bf16 where the CPU has them."""
    module, threads, rounds = native.load(), torch.get_num_threads(), 1_000_000
    flops = module.machine_multiply_add(rounds, pairs, threads)
    return lambda: module.machine_multiply_add(rounds, pairs, threads), flops


def measure_ceilings(seconds: float, device: str = "cpu") -> dict[str, float]:
    """FLOP/s and bytes/s of everything above, measured together."""
    if device == "cuda":
        calls = {f"mm {str(dtype).removeprefix('torch.')}": mm(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
        return _rates(calls | {"copy": read(device)}, seconds, device)
    calls = {"mm float32": mm(torch.float32), "mm bfloat16": mm(torch.bfloat16), "read": read(), "registers float32": register_peak(False)}
    if native.isa() in ("avx512bf16", "emulated"):
        calls["registers bfloat16"] = register_peak(True)
    return _rates(calls, seconds, device)


def _rates(calls, seconds, device):
    times, _ = interleave({name: call for name, (call, _) in calls.items()}, seconds, device)
    return {name: work / times[name] for name, (_, work) in calls.items()}
