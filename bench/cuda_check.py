"""Compiles every Triton kernel for GPUs, on any machine, and looks at what came out: python -m bench.cuda_check

Fails when a loop that multiplies matrices (or, in a kernel without one, any innermost loop) touches spilled registers; when shared memory
exceeds what the architecture has; when the main loop of a bf16 or fp16 matrix kernel has no wgmma on sm_90a; and when a kernel needs more
registers, stack or shared memory than bench/results/compile.json remembers. `--keep` writes into that file what was compiled.
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

TABLE = Path(__file__).parent / "results" / "compile.json"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one block may have
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


def innermost_loops(sass):
    """Texts of the loops (label … backward branch to it) that contain no other loop, from a disassembly."""
    lines = sass.splitlines()
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    spans = []
    for at, line in enumerate(lines):
        match = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if match and labels.get(match[1], at) < at:
            spans.append((labels[match[1]], at))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return ["\n".join(lines[start : end + 1]) for start, end in inner]


def figures(sass, resources, shared, matrix):
    """What the table keeps of a kernel, and what is judged.

    sass, resources  what nvdisasm and cuobjdump --dump-resource-usage print; matrix: whether it multiplies bf16 or fp16 matrices
    """
    registers, stack = (int(re.search(rf"{word}:(\d+)", resources)[1]) for word in ("REG", "STACK"))
    loops = innermost_loops(sass)
    main = [loop for loop in loops if _MATRIX.search(loop)] or ([] if matrix else loops)
    return {
        "registers": registers, "stack": stack, "shared": shared, "spills": len(_SPILL.findall(sass)),
        "loop_spills": sum(len(_SPILL.findall(loop)) for loop in main),
        "multiplies_with": sorted({word for loop in main for word in _MATRIX.findall(loop)}),
        "main_loops": len(main),
    }  # fmt: skip


def compile_one(key):
    """(key, figures) of one spec."""
    import triton

    spec, tools = specs()[key], Path(triton.__file__).parent / "backends/nvidia/bin"
    compiled = spec.compile()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, resources = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "--dump-resource-usage"))
        )
    return key, figures(sass, resources, compiled.metadata.shared, spec.matrix)


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


def _compare(results, everything):
    import triton

    table, wrong = json.loads(TABLE.read_text()), []
    if table["triton"] != triton.__version__:
        print(f"{TABLE.name} was made with Triton {table['triton']}, this is {triton.__version__}: figures are not compared")
        return []
    for (name, capability), found in results.items():
        wrong += regressions(name, capability, found, table["kernels"].get(name, {}).get(f"sm_{capability}"))
    if everything:
        gone = {(n, int(c.removeprefix("sm_"))) for n, row in table["kernels"].items() for c in row} - set(results)
        wrong += [f"{n} sm_{c}: in {TABLE.name}, but no kernel is called so. Remedy: make cuda-check ARGS=--keep" for n, c in sorted(gone)]
    return wrong


def _keep(results, everything):
    """Writes the table: with `everything` anew, else only the rows of `results`."""
    import triton

    rows = {} if everything else json.loads(TABLE.read_text())["kernels"]
    for (name, capability), found in results.items():
        rows.setdefault(name, {})[f"sm_{capability}"] = found
    texts = []
    for name, row in sorted(rows.items()):  # a line for each, so that a change shows as one
        found = ",\n".join(f"   {json.dumps(arch)}: {json.dumps(figures)}" for arch, figures in sorted(row.items()))
        texts.append(f"  {json.dumps(name)}: {{\n{found}\n  }}")
    kernels = ",\n".join(texts)
    TABLE.write_text(f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n{kernels}\n }}\n}}\n')


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_check", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels whose name contains TEXT, e.g. --only 'masked_lm_head'")
    parser.add_argument("--capability", type=int, choices=sorted(SHARED_LIMIT), help="one architecture alone")
    parser.add_argument("--keep", action="store_true", help="write the figures into bench/results/compile.json instead of comparing")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    start = time.time()
    keys = [(name, c) for name, c in specs() if options.only in name and options.capability in (None, c)]
    everything = len(keys) == len(specs())
    if not keys:
        parser.error(f"no kernel is called like {options.only!r}; they are: {', '.join(sorted({name for name, _ in specs()}))}")
    results = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for (name, capability), found in pool.imap(compile_one, keys):
            results[name, capability] = found
            print(f"sm_{capability:<4}{name:60} {found['registers']:4} registers {found['stack']:5} B stack {found['shared']:7} B shared  "
                  f"{'+'.join(found['multiplies_with'])}", flush=True)  # fmt: skip
    wrong = [text for key, found in results.items() for text in problems(*key, specs()[key].matrix, found)]
    if not options.keep:
        wrong += _compare(results, everything)
    elif not wrong:
        _keep(results, everything)
    print(f"{len(results)} kernels in {time.time() - start:.0f} s")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
