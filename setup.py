"""Builds csrc/ with CMake and ninja into longvita_kernels/_native, and csrc/cuda/ into _native_cuda (metadata: pyproject.toml).

    pip install .                            # needs a C++17 compiler (g++ >= 10, clang >= 12); CMake, ninja and pybind11 come by themselves
    python setup.py build_ext --inplace      # incremental, for development
    LONGVITA_NATIVE=0 pip install .          # pure Python: every op runs its reference
    LONGVITA_CUDA=1 pip install .            # with the CUDA kernels: needs nvcc (CUDA 12.8 or later), no GPU. 0: without
                                             # auto, the default: with them where nvcc and a GPU are there
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """The program beside this interpreter, then on the path."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise SystemExit(f"longvita: building the native kernels needs {name}, which was not found; pip install {name}, "
                         "or set LONGVITA_NATIVE=0 to install without native kernels")
    return found


# What is said when a build fails.
NEEDS = {
    "_native": "the native kernels could not be built ({}). They need a C++17 compiler with OpenMP (Debian: apt-get install g++). "
    "Set LONGVITA_NATIVE=0 to install without them: slow, but complete",
    "_native_cuda": "the CUDA kernels could not be built ({}). They need nvcc of CUDA 12.8 or later. "
    "Set LONGVITA_CUDA=0 to install without them",
}


def nvcc() -> str | None:
    """The compiler that CUDACXX names, else that on the path, in CUDA_HOME or at its usual place."""
    homes = [Path(home) / "bin" / "nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *map(str, homes)]
    return next((path for path in found if path and shutil.which(path)), None)


def wants_cuda() -> bool:
    """LONGVITA_CUDA=1, or auto where nvcc and a GPU are there."""
    wanted = os.environ.get("LONGVITA_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"longvita: LONGVITA_CUDA is {wanted!r}; expected auto, 0 or 1")
    if wanted == "1" and nvcc() is None:
        raise SystemExit("longvita: LONGVITA_CUDA=1, but nvcc was not found. Put CUDA's bin folder on the PATH, or set CUDACXX, CUDA_HOME")
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return wanted == "1" or (wanted == "auto" and has_gpu and nvcc() is not None)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        name = ext.name.rpartition(".")[2]
        source, build = ROOT / "csrc", Path(self.build_temp).resolve() / "cmake"
        settings = [f"-DLV_SANITIZE={os.environ.get('LONGVITA_SANITIZE', '')}"]
        if name == "_native_cuda":
            source, build, settings = source / "cuda", build.with_name("cmake-cuda"), [f"-DCMAKE_CUDA_COMPILER={nvcc()}"]

        def run(*command: str) -> None:
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                why = f"exit code {error.returncode}; the compiler's message is above"
                raise SystemExit(f"longvita: {NEEDS[name].format(why)}") from None

        build.mkdir(parents=True, exist_ok=True)
        with open(build / "lock", "w") as lock:      # two builds in one directory would spoil each other
            fcntl.flock(lock, fcntl.LOCK_EX)
            run(tool("cmake"), "-G", "Ninja", "-S", str(source), "-B", str(build), *settings, f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *os.environ.get("CMAKE_ARGS", "").split())
            run(tool("cmake"), "--build", str(build), "--target", name)
            replace(build / Path(self.get_ext_filename(ext.name)).name, Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            source = Path(self.build_lib) / self.get_ext_filename(ext.name)
            replace(source, ROOT / self.get_ext_filename(ext.name))


def replace(source: Path, target: Path) -> None:
    """Copies by rename: a process that has the old library open keeps it, and nobody sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.copy2(source, partial)
    os.replace(partial, target)


native = os.environ.get("LONGVITA_NATIVE", "1") != "0"
names = ["_native", *(["_native_cuda"] if wants_cuda() else [])] if native else []
setup(
    ext_modules=[Extension(f"longvita_kernels.{name}", sources=[]) for name in names],
    cmdclass={"build_ext": CMakeBuild} if native else {},
)
