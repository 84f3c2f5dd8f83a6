"""Compiles every GPU kernel, on any machine, and looks at what came out: python -m bench.cuda_check

Triton compiles its own kernels; csrc/cuda/*.cu needs nvcc (bench/cuda_cpp.py), and a machine without it must say --no-cuda-cpp.

Fails when a loop that multiplies matrices (or, in a kernel without one, any innermost loop) touches spilled registers; when shared memory
exceeds what the architecture has; when the main loop of a bf16 or fp16 matrix kernel has no wgmma on sm_90a; when nvcc warns of anything;
and when a kernel needs more registers, stack or shared memory than bench/results/compile.json remembers. (Shared memory that a launch in
C++ asks for is not in these figures: it is asserted where it is laid out.) `--keep` writes into that file what was compiled.

Architectures: sm_80, sm_90a and sm_100a; with --all, or as --capability names them, also sm_86, sm_89 and sm_120, whose blocks have 99 KiB
of shared memory.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import cuda_cpp

TABLE = Path(__file__).parent / "results" / "compile.json"
# Bytes of shared memory that one block may have, by capability.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
USUAL = (80, 90, 100)  # compiled unless others are asked for
REGISTER_STEP = 8  # registers are handed out in eights: fewer more is no regression
_MATRIX = re.compile(r"\b(HGMMA|HMMA|UTCHMMA)\b")
_SPILL = re.compile(r"\b(LDL|STL)\b")


@functools.cache
def specs():
    """{(name, capability): CompileSpec} of every module in longvita_kernels.triton, in a fixed order."""
    import longvita_kernels.triton as package

    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for spec in getattr(module, "compile_specs", tuple)():
            if (spec.name, spec.capability) in found:
                raise ValueError(f"two specs are called {spec.name!r} for sm_{spec.capability}; names must tell them apart")
            found[spec.name, spec.capability] = spec
    return found


# ---------------------------------------------------------------------------------------------------------------------------- what came out


def loops(sass):
    """(first line, last line) of each loop, label to backward branch, and all lines of a disassembly."""
    lines = sass.splitlines()
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    spans = []
    for at, line in enumerate(lines):
        match = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if match and labels.get(match[1], at) < at:
            spans.append((labels[match[1]], at))
    return spans, lines


def main_loops(sass, matrix):
    """Texts of the smallest loops that multiply matrices; where none does, of the innermost loops, unless it should (`matrix`).

    A loop that multiplies may well contain one that only waits for memory.
    """
    spans, lines = loops(sass)
    multiplying = [(a, b) for a, b in spans if _MATRIX.search("\n".join(lines[a : b + 1]))]
    spans = multiplying or ([] if matrix else spans)
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return ["\n".join(lines[start : end + 1]) for start, end in inner]


def figures(sass, resources, shared, matrix):
    """What the table keeps of a kernel, and what is judged.

    sass, resources  what nvdisasm and cuobjdump --dump-resource-usage print; matrix: whether it multiplies bf16 or fp16 matrices
    """
    registers, stack = (int(re.search(rf"{word}:(\d+)", resources)[1]) for word in ("REG", "STACK"))
    main = main_loops(sass, matrix)
    return {
        "registers": registers, "stack": stack, "shared": shared, "spills": len(_SPILL.findall(sass)),
        "loop_spills": sum(len(_SPILL.findall(loop)) for loop in main),
        "multiplies_with": sorted({word for loop in main for word in _MATRIX.findall(loop)}),
        "main_loops": len(main),
    }  # fmt: skip


def _tools():
    """Triton's folder with nvdisasm and cuobjdump."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_one(key):
    """(key, figures) of one spec."""
    spec, tools = specs()[key], _tools()
    compiled = spec.compile()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, resources = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "--dump-resource-usage"))
        )
    return key, figures(sass, resources, compiled.metadata.shared, spec.matrix)


def compile_file(unit):
    """({(kernel, capability): (figures, matrix)}, warnings) of a file in CUDA C++ and an architecture."""
    source, architecture = unit
    kernels, warnings = cuda_cpp.compile_unit(source, architecture, _tools())
    found = {}
    for kernel, (sass, resources) in kernels.items():
        matrix = cuda_cpp.matrix(source, kernel)
        shared = int(re.search(r"SHARED:(\d+)", resources)[1])
        key = f"{source.name} {kernel}", cuda_cpp.capability(architecture)
        found[key] = figures(sass, resources, shared, matrix), matrix
    return found, [f"{source.name} {architecture}: {line}" for line in warnings]


# -------------------------------------------------------------------------------------------------------------------------------- judgement


def problems(name, capability, matrix, found):
    """What is wrong with a kernel whatever it was before, in words."""
    wrong = []
    if found["loop_spills"]:
        wrong.append(f"{found['loop_spills']} instructions in its main loop move spilled registers")
    if found["shared"] > SHARED_LIMIT[capability]:
        wrong.append(f"{found['shared']} bytes of shared memory; sm_{capability} has {SHARED_LIMIT[capability]}")
    if matrix and not found["main_loops"]:
        wrong.append("no loop of it multiplies matrices")
    if matrix and capability == 90 and found["multiplies_with"] != ["HGMMA"]:
        wrong.append(f"its main loop multiplies with {', '.join(found['multiplies_with']) or 'nothing'}, not with wgmma")
    return [f"{name} sm_{capability}: {text}" for text in wrong]


def regressions(name, capability, found, kept):
    """What a kernel needs more of than the table remembers, in words."""
    if kept is None:
        return [f"{name} sm_{capability}: not in {TABLE.name}. Remedy: look at its figures, then make cuda-check ARGS=--keep"]
    slack = {"registers": REGISTER_STEP - 1, "stack": 0, "shared": 0, "spills": 0}
    return [
        f"{name} sm_{capability}: {what} rose from {kept[what]} to {found[what]}"
        for what, more in slack.items() if found[what] > kept[what] + more
    ]  # fmt: skip


def _versions(parts):
    """{part: version of its compiler now}; a part is a pair of keys in the table."""
    import triton

    return {part: triton.__version__ if part == "triton" else cuda_cpp.version() for part in parts}


_KERNELS = {"triton": "kernels", "nvcc": "cuda_kernels"}  # what compiles them → where the table has them


def _rows_gone(rows, found, capabilities):
    """(name, "sm_90") of rows for these capabilities whose kernel is not among those found."""
    kept = {(name, arch) for name, row in rows.items() for arch in row if int(arch.removeprefix("sm_")) in capabilities}
    return sorted(kept - {(name, f"sm_{capability}") for name, capability in found})


def _compare(results, whole):
    """results: {"triton" or "nvcc": {(name, capability): figures}}; whole: the capabilities of which every kernel is there."""
    table, wrong = json.loads(TABLE.read_text()), []
    for part, version in _versions(results).items():
        rows = table.get(_KERNELS[part], {})
        if table.get(part) != version:
            print(f"{TABLE.name} was made with {part} {table.get(part)}, this is {version}: its figures are not compared")
            continue
        for (name, capability), found in results[part].items():
            wrong += regressions(name, capability, found, rows.get(name, {}).get(f"sm_{capability}"))
        wrong += [
            f"{name} {arch}: in {TABLE.name}, but no kernel is called so. Remedy: make cuda-check ARGS=--keep"
            for name, arch in _rows_gone(rows, results[part], whole)
        ]
    return wrong


def _keep(results, whole):
    """Writes the rows of `results` into the table, and takes out those of kernels that are gone."""
    table = json.loads(TABLE.read_text())
    for part, version in _versions(results).items():
        rows = table.setdefault(_KERNELS[part], {})
        table[part] = version
        for name, arch in _rows_gone(rows, results[part], whole):
            del rows[name][arch]
        for (name, capability), found in results[part].items():
            rows.setdefault(name, {})[f"sm_{capability}"] = found
        table[_KERNELS[part]] = {name: row for name, row in rows.items() if row}
    parts = [f' "{part}": {json.dumps(table[part])},\n "{key}": {_written(table[key])}' for part, key in _KERNELS.items() if key in table]
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _written(rows):
    texts = []
    for name, row in sorted(rows.items()):  # a line for each, so that a change shows as one
        archs = sorted(row, key=lambda arch: int(arch.removeprefix("sm_")))
        found = ",\n".join(f"   {json.dumps(arch)}: {json.dumps(row[arch])}" for arch in archs)
        texts.append(f"  {json.dumps(name)}: {{\n{found}\n  }}")
    return "{\n" + ",\n".join(texts) + "\n }"


def _arguments(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_check", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels whose name contains TEXT, e.g. --only 'masked_lm_head'")
    parser.add_argument("--capability", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=USUAL, help="only these, e.g. 90")
    parser.add_argument("--all", dest="capability", action="store_const", const=tuple(SHARED_LIMIT), help="every architecture")
    parser.add_argument("--cuda-cpp", action=argparse.BooleanOptionalAction, default=True, help="csrc/cuda/*.cu too, which needs nvcc")
    parser.add_argument("--triton", action=argparse.BooleanOptionalAction, default=True, help="the Triton kernels too")
    parser.add_argument("--keep", action="store_true", help="write the figures into bench/results/compile.json instead of comparing")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    keys = [(name, c) for name, c in specs() if options.only in name and c in options.capability] if options.triton else []
    files = [
        (source, architecture) for source, architecture in (cuda_cpp.units() if options.cuda_cpp else ())
        if (options.only in source.name or source.name in options.only) and cuda_cpp.capability(architecture) in options.capability
    ]  # fmt: skip
    if not keys and not files:
        parser.error(f"no kernel is called like {options.only!r}; they are: {', '.join(sorted({name for name, _ in specs()}))}")
    return options, keys, files


def _print(key, found):
    name, capability = key
    print(f"sm_{capability:<4}{name:60} {found['registers']:4} registers {found['stack']:5} B stack {found['shared']:7} B shared  "
          f"{'+'.join(found['multiplies_with'])}", flush=True)  # fmt: skip


def main(arguments=None):
    options, keys, files = _arguments(arguments)
    if files:
        try:
            cuda_cpp.nvcc()
        except FileNotFoundError as error:
            print(f"bench.cuda_check: {error}", file=sys.stderr)
            return 1
    start, whole = time.time(), () if options.only else options.capability
    results, wrong = {part: {} for part, wanted in (("triton", keys), ("nvcc", files)) if wanted}, []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        compiled = pool.imap(compile_file, files)  # the longest first
        for key, found in pool.imap(compile_one, keys):
            results["triton"][key] = found
            _print(key, found)
            wrong += problems(*key, specs()[key].matrix, found)
        for kernels, warnings in compiled:
            wrong += warnings
            for key, (found, matrix) in kernels.items():
                if options.only in key[0]:
                    results["nvcc"][key] = found
                    _print(key, found)
                    wrong += problems(*key, matrix, found)
    if not options.keep:
        wrong += _compare(results, whole)
    elif not wrong:
        _keep(results, whole)
    print(f"{sum(map(len, results.values()))} kernels in {time.time() - start:.0f} s")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
