"""`longvita doctor`: what is installed, what is missing and why. Exit code 0 if nothing needs to be fixed, else 1.

Other programs that keep the processor busy are reported as a warning: longvita is slower while they run, but nothing needs fixing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from longvita import threads
from longvita.cli import errors

GIB = 2**30
# A demo run leaves about 0.2 GB, and a checkpoint being written needs room beside the two that are kept.
MIN_FREE_DISK = 1 * GIB
MIN_FREE_MEMORY = 2 * GIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return errors.FAILED if report["problems"] else errors.OK


def examine(directory: str | os.PathLike[str] = ".") -> dict[str, Any]:
    """Everything that decides whether and how fast longvita runs here.

    `problems` lists what needs fixing, `warnings` what passes by itself.
    """
    report: dict[str, Any] = {
        "longvita": _version("longvita"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "core_quota": threads.core_quota(),  # a limit on CPU time, in cores
        "torch": _torch(),
        "native": _native(),
        "backend": _backend(),
        "cuda_kernels": _cuda_kernels(),
        "openmp_runtimes": openmp_runtimes(),  # after torch and the native core are loaded
        "wait_policy": threads.wait_policy(),
        "cores_taken": threads.sample_cores_taken(),  # by other programs
        "extras": _extras(),
        "disk_free_bytes": shutil.disk_usage(directory).free,
        "memory_bytes": _memory("MemTotal"),
        "memory_free_bytes": _memory("MemAvailable"),
    }
    report["problems"] = problems(report)
    report["warnings"] = warnings(report)
    return report


def problems(report: dict[str, Any]) -> list[str]:
    """What keeps this machine from working well, each with its remedy."""
    found = []
    torch, native, runtimes = report["torch"], report["native"], report["openmp_runtimes"]
    if "missing" in torch:
        found.append(f"torch cannot be imported: {torch['missing']}. Install it with: pip install torch")
    if not native["loaded"]:
        found.append(f"the native core is not loaded, so every op runs its slow reference: {native['missing']}")
    if report["backend"]["wrong"]:
        found.append(f"LONGVITA_BACKEND: {report['backend']['wrong']}")
    if len(runtimes) > 1:
        found.append(f"{len(runtimes)} OpenMP runtimes in one process fight for the cores: {', '.join(runtimes)}; import torch first")
    if report["disk_free_bytes"] < MIN_FREE_DISK:
        found.append(f"only {_gib(report['disk_free_bytes'])} of disk are free: checkpoints need at least {_gib(MIN_FREE_DISK)}")
    if report["memory_free_bytes"] is not None and report["memory_free_bytes"] < MIN_FREE_MEMORY:
        found.append(f"only {_gib(report['memory_free_bytes'])} of memory are free: the demo needs {_gib(MIN_FREE_MEMORY)}")
    return found


def warnings(report: dict[str, Any]) -> list[str]:
    """What makes longvita slower at the moment."""
    taken = report["cores_taken"]
    if taken is None or taken <= threads.TAKEN:
        return []
    busy = f"other programs keep {taken:.1f} of {report['cores']} cores busy"
    return [f"{busy}: training is slower and measurements are unreliable until they stop"]


def print_report(report: dict[str, Any]) -> None:
    torch, native = report["torch"], report["native"]
    limited = report["core_quota"] is not None and report["core_quota"] < report["cores"]
    quota = f" (CPU time limited to {report['core_quota']:g} by a control group)" if limited else ""
    lines = [
        ("longvita", report["longvita"] or "not installed as a package (running from its source tree)"),
        ("python", f"{report['python']} at {sys.executable}"),
        ("machine", f"{report['cpu']}, {report['cores']} cores{quota}, {report['platform']}"),
        ("memory", f"{_gib(report['memory_free_bytes'])} free of {_gib(report['memory_bytes'])}"),
        ("disk", f"{_gib(report['disk_free_bytes'])} free in {Path.cwd()}"),
        ("torch", torch.get("missing") or _torch_line(torch)),
        ("native core", _native_line(native)),
        *([("CUDA kernels", report["cuda_kernels"] or "loaded")] if torch.get("gpus") else []),
        ("OpenMP", f"{', '.join(report['openmp_runtimes']) or 'no runtime loaded'}; wait policy: {report['wait_policy']}"),
    ]
    for extra, packages in report["extras"].items():
        missing = [name for name, installed in packages.items() if installed is None]
        lines.append((f"extra {extra}", f'missing {", ".join(missing)}: pip install "longvita[{extra}]"' if missing else "installed"))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    print()
    for kind in ("warning", "problem"):
        for text in report[f"{kind}s"]:
            print(f"{kind}: {text}")
    print(f"{len(report['problems'])} problem(s) found." if report["problems"] else "No problems found.")


def _torch_line(torch: dict[str, Any]) -> str:
    fixed = f" (fixed by {', '.join(torch['threads_fixed_by'])})" if torch["threads_fixed_by"] else ""
    return f"{torch['version']}, {torch['threads']} threads{fixed}, GPUs: {', '.join(torch['gpus']) or 'none'}"


def _native_line(native: dict[str, Any]) -> str:
    if not native["loaded"]:
        return f"NOT LOADED: {native['missing']}"
    cap = f", capped by LONGVITA_ISA={native['isa_cap']}" if native["isa_cap"] else ""
    built = ", ".join(name if runs else f"{name} (not on this machine)" for name, runs in native["built_isas"].items())
    return f"loaded, uses {native['isa']}{cap}; built: {built}"


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes mapped into this process, each once (Linux; empty elsewhere)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if re.search(r"/lib(gomp|omp|iomp5)[^/]*\.so", path))


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"missing": str(error)}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    fixed = [f"{name}={os.environ[name]}" for name in threads.FIXED_BY if os.environ.get(name)]
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "threads_fixed_by": fixed, "gpus": gpus}


def _backend() -> dict[str, str | None]:
    """The backend that LONGVITA_BACKEND asks for, or why that cannot be."""
    try:
        from longvita_kernels import backends

        return {"requested": backends.requested(), "wrong": None}
    except (ImportError, ValueError, RuntimeError) as error:
        return {"requested": None, "wrong": str(error)}


def _cuda_kernels() -> str | None:
    """Why the kernels in CUDA C++ cannot be used, or None."""
    from longvita_kernels.cuda import native_cuda

    return native_cuda.why_missing()


def _native() -> dict[str, Any]:
    try:
        from longvita_kernels import native
    except ImportError as error:
        return {"loaded": False, "missing": str(error)}
    if native.load() is None:
        return {"loaded": False, "missing": native.why_missing()}
    return {"loaded": True, "isa": native.isa(), "built_isas": native.built_isas(), "isa_cap": native.isa_cap()}


def _extras() -> dict[str, dict[str, str | None]]:
    return {extra: {name: _version(name) for name in sorted(names)} for extra, names in sorted(errors.extras().items())}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _proc_field(path: str, field: str) -> str | None:
    """The value of the first `field: value` line of a /proc file, None where there is none."""
    if not Path(path).exists():
        return None
    match = re.search(rf"^{field}\s*:\s*(.+)$", Path(path).read_text(), re.MULTILINE)
    return match[1].strip() if match else None


def _cpu_name() -> str:
    return _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _memory(field: str) -> int | None:
    value = _proc_field("/proc/meminfo", field)
    return int(value.split()[0]) * 1024 if value else None


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / GIB:.1f} GiB"
