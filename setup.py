"""Builds csrc/ with CMake and ninja into longvita_kernels/_native (metadata: pyproject.toml).

    pip install .                            # needs a C++17 compiler (g++ >= 10, clang >= 12); CMake, ninja and pybind11 come by themselves
    python setup.py build_ext --inplace      # incremental, for development
    LONGVITA_NATIVE=0 pip install .          # pure Python: every op runs its reference
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


def run(*command: str) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"longvita: the native kernels could not be built (exit code {error.returncode}; the compiler's message is above). They need a "
            "C++17 compiler with OpenMP (Debian: apt-get install g++). Set LONGVITA_NATIVE=0 to install without them: slow, but complete"
        ) from None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        with open(build / "lock", "w") as lock:      # two builds in one directory would spoil each other
            fcntl.flock(lock, fcntl.LOCK_EX)
            run(tool("cmake"), "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build), f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DLV_SANITIZE={os.environ.get('LONGVITA_SANITIZE', '')}", *os.environ.get("CMAKE_ARGS", "").split())
            run(tool("cmake"), "--build", str(build), "--target", "_native")
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
setup(
    ext_modules=[Extension("longvita_kernels._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild} if native else {},
)
