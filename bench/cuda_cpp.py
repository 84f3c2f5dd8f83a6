"""csrc/cuda/*.cu compiled by nvcc for bench.cuda_check: which files, for which architectures, and what each kernel became.

A file says so itself, in comments: `// architectures: sm_80 sm_90a` on its first line, and, where kernels must multiply with wgmma on
sm_90a, a line `// wgmma: forward_kernel backward_kernel` with the beginnings of their names.
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "csrc" / "cuda"
_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", f"-I{FOLDER}", f"-I{FOLDER.parent / 'include'}", "-Xptxas", "-warn-spills")


def architectures(source):
    """("sm_80", "sm_90a", …) of a file."""
    first = source.read_text().partition("\n")[0]
    if not first.startswith("// architectures: sm_"):
        raise ValueError(f"{source.name} begins with {first!r}; expected a line like '// architectures: sm_80 sm_90a sm_100a'")
    return tuple(first.removeprefix("// architectures: ").split())


def capability(architecture):
    """90 of "sm_90a"."""
    return int(re.fullmatch(r"sm_(\d+)a?", architecture)[1])


def units():
    """[(file, architecture)] of all kernels there are."""
    return [(source, architecture) for source in sorted(FOLDER.glob("*.cu")) for architecture in architectures(source)]


def matrix(source, kernel):
    """Whether a kernel of this file must multiply with wgmma on sm_90a."""
    names = re.search(r"^// wgmma: (.+)$", source.read_text(), re.MULTILINE)
    return names is not None and kernel.startswith(tuple(names[1].split()))


def nvcc():
    """The compiler's path; FileNotFoundError, with the remedy, where there is none."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise FileNotFoundError("nvcc was not found, and csrc/cuda/ needs it. Remedy: put CUDA's bin folder on the PATH, or --no-cuda-cpp")
    return found


def version():
    """ "13.0.88" """
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


def compile_unit(source, architecture, tools):
    """({kernel: (disassembly, resources)}, what the compiler warned of) of one file on one architecture; tools: folder with cuobjdump."""
    number = architecture.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc(), *_FLAGS, f"-gencode=arch=compute_{number},code={architecture}", "-cubin", "-o", cubin, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {architecture}:\n{done.stderr}")
        warnings = [line.strip() for line in (done.stdout + done.stderr).splitlines() if re.search(r"warning|loss", line, re.IGNORECASE)]
        sass, resources = (
            subprocess.run([Path(tools) / tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "--dump-resource-usage"))
        )
    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", resources))
    code = dict(re.findall(r"^//-+ \.text\.(\S+) -+\n(.*?)(?=^//-{8}|\Z)", sass, re.MULTILINE | re.DOTALL))
    names = _demangled(usage)
    return {short_name(names[mangled]): (code[mangled], line) for mangled, line in usage.items()}, warnings


def _demangled(names):
    """{mangled: as it is written} with c++filt, which comes with every g++."""
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, said.splitlines(), strict=True))


def short_name(written):
    """ "few_rows_kernel<float, true>" of "void longvita::cuda::(anonymous namespace)::few_rows_kernel<float, true>(Args, int)"."""
    written, depth = written.replace("(anonymous namespace)::", ""), 0
    for at, letter in enumerate(written):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            written = written[:at]
            break
    template = written.find("<")
    start = re.search(r"[^:\s]*$", written if template < 0 else written[:template]).start()
    return written[start:].replace("longvita::", "")
