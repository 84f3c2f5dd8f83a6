"""_native_cuda for the CPU: csrc/cuda/ compiled by g++ against tests/cuda/shim/, which runs a block's threads in turn, and the kernels of
attention on the emulator of their own (csrc/cuda/emulate/).

`build()` → the library's path, for LONGVITA_CUDA_EMULATED. It is kept in build/ under a name that follows from the sources.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]
SHIM, CSRC = Path(__file__).parent / "shim", ROOT / "csrc"
KERNELS, HOST = ("merge_attention.cu", "lm_head.cu"), ("peer_copy.cpp",)
BINDINGS = ("attention", "merge_attention", "lm_head", "peer_copy")
_FLAGS = ["-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-DLV_ON_CPU", "-DLV_EMULATE"]


def compiler():
    """g++ or whatever CXX names, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build():
    sources = sorted(path for folder in (SHIM, CSRC / "cuda", CSRC / "include") for path in folder.rglob("*.[ch]*"))
    text = b"".join(path.read_bytes() for path in [*sources, CSRC / "bind_merge_attention.h", Path(__file__)])
    folder = ROOT / "build" / f"emulated-{hashlib.sha256(text).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"_native_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(folder, library)
    return library


def _compile(folder, library):
    bindings = folder / "bindings.cpp"  # pybind11's headers take seconds: once for all
    bindings.write_text("".join(f'#include "bind_{name}.cpp"\n' for name in BINDINGS) + '#include "module.cpp"\n')
    binds = " ".join(f"LV_BIND({name})" for name in BINDINGS)
    folders = [SHIM, CSRC / "include", CSRC / "cuda", pybind11.get_include(), sysconfig.get_path("include")]
    common = [compiler(), *_FLAGS, f"-DLV_BIND_LIST={binds}", *(f"-I{path}" for path in folders)]
    objects = []
    for source in (*(CSRC / "cuda" / name for name in (*KERNELS, *HOST)), SHIM / "attention.cpp", bindings):
        objects.append(str(folder / f"{source.name}.o"))
        extra = ["-iquote", str(CSRC / "cuda"), "-O0" if source == bindings else "-O1"]
        _run([*common, *extra, "-x", "c++", "-c", str(source), "-o", objects[-1]])
    partial = f"{library}.part"
    _run([compiler(), "-shared", *objects, "-o", partial])
    os.replace(partial, library)


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
