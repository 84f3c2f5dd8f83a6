"""python -m bench varlen_attention --dtype bfloat16 --case packed

Measures ops on this machine: checks each on the very tensors that it times, runs it, its peers and the machine's ceiling in the same
rounds, and prints time, rate, share of the ceiling, peak memory and the ratio to each peer; one line of JSON last. What runs on several
processes has options of its own: python -m bench ring --help (ring attention), python -m bench busy --help (training on a busy machine).
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

from bench import busy, machine, report, ring
from bench.harness import Case, Result, failures, measure, reason, weigh
from longvita_kernels import backends, native

MODULES = ("varlen_attention", "linear_cross_entropy", "masked_lm_head", "pixel_shuffle_projection", "decode_attention", "dispatch", "host")
PROGRAMS = {"ring": ring, "busy": busy}  # several processes, with options of their own


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    about, usage = __doc__.split("\n\n")[1], __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench", description=about, epilog=f"Example: {usage}")
    parser.add_argument("modules", nargs="*", metavar="op", help=f"what to measure, of {', '.join(MODULES)}; default: all")
    parser.add_argument("--case", action="append", default=[], metavar="TEXT", help="only cases whose name has this text; repeatable")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="only cases of this dtype")
    parser.add_argument("--heavy", action="store_true", help="also the cases that take minutes each on a small machine")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure the peers too")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long the rounds of one case last (default 10)")
    parser.add_argument("--runs", type=int, default=1, help="whole runs, of which the median counts (default 1; results are kept from 3)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu; the goals are those of a CPU")
    parser.add_argument("--backend", choices=backends.NAMES, help="what runs the ops; default: the choice that a user gets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to a file too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser.parse_args(argv)


def select(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for."""
    unknown = [name for name in arguments.modules if name not in MODULES]
    if unknown:
        raise ValueError(f"unknown op {unknown[0]!r}; expected one of {', '.join(MODULES)}")
    found = [case for name in arguments.modules or MODULES for case in _cases(name, arguments.device)]
    found = [case for case in found if arguments.heavy or not case.heavy]
    found = [case for case in found if all(text in case.name for text in arguments.case)]
    if arguments.dtype:
        found = [case for case in found if case.dtype == getattr(torch, arguments.dtype)]
    if not arguments.peers:
        found = [_without_peers(case) for case in found]
    if not found:
        raise ValueError("no case fits; see python -m bench --list (and --heavy for the largest ones)")
    return found


def _cases(name, device):
    """A module's cases; on a GPU those of its size where the module has some, and without the goals of a CPU."""
    module = importlib.import_module(f"bench.{name}")
    if device == "cpu":
        return list(module.cases())
    return [replace(case, goals=()) for case in getattr(module, "cuda_cases", module.cases)()]


def run(case: Case, ceilings: dict, arguments: argparse.Namespace) -> Result:
    """The case, `runs` times over; the result whose share (or time) is the median, with medians of all times."""
    ceiling = ceilings[case.dtype if case.ceiling == "mm" else case.ceiling] if case.ceiling else None
    results = []
    for _ in range(arguments.runs):
        results.append(measure(case, ceiling, arguments.seconds, device=arguments.device))
        if results[-1].problems:
            return results[-1]
    seconds = {name: statistics.median(r.seconds[name] for r in results) for name in results[0].seconds}
    # within a run the ceiling and the op saw the same machine: the median is taken of their ratio, not of each alone
    share = statistics.median(r.share for r in results) if case.ceiling else None
    joined = replace(results[-1], seconds=seconds, rounds=sum(r.rounds for r in results))
    return replace(joined, ceiling_rate=joined.ceiling_rate * joined.share / share) if share else joined


def _without_peers(case):
    def build():
        setup = case.build()
        return replace(setup, calls={name: call for name, call in setup.calls.items() if name.startswith("longvita")})

    return replace(case, build=build)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in PROGRAMS:
        return PROGRAMS[argv[0]].main(argv[1:])
    arguments = _arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        chosen = select(arguments)
        if arguments.runs < 1 or arguments.seconds < 0:
            raise ValueError(f"runs is {arguments.runs}, seconds {arguments.seconds}; expected at least 1, and not negative")
        if arguments.list:
            print(*(f"{case.op}: {case.name}{' (heavy)' if case.heavy else ''}" for case in chosen), sep="\n")
            return 0
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device; run it on a machine that has one, see bench/gpu.sh")
        if arguments.device == "cpu" and native.load() is None:
            raise ValueError(f"there is nothing to measure: {native.why_missing()}")
        backends.use(arguments.backend or backends.requested())
    except (RuntimeError, ValueError) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    return _report(chosen, arguments)


def _report(chosen: list[Case], arguments: argparse.Namespace) -> int:
    device = arguments.device
    about = machine.describe(device)
    print("{cpu}, {threads} threads, {isa}; torch {torch}; commit {commit}; load {load}".format(**about))
    if device == "cuda":
        print("{gpu}, {architecture}, CUDA {cuda}; backend {backend}".format(**about))
    ceilings = {case.dtype: machine.mm(case.dtype, device) for case in chosen if case.ceiling == "mm"}
    if any(case.ceiling == "read" for case in chosen):
        ceilings["read"] = machine.read(device)
    about["ceilings"] = machine.measure_ceilings(arguments.seconds / 4, device)
    print(*(f"{name}: {value / 1e9:.1f} G" for name, value in about["ceilings"].items()), sep="; ", flush=True)
    results = []
    for case in chosen:
        try:
            results.append(run(case, ceilings, arguments))
        except failures() as error:  # the other cases can still be measured
            results.append(Result(case=case, problems=[reason(error)]))
        print(*report.lines(results[-1]), sep="\n", flush=True)
        _write(about, results, arguments)  # after every case: a run that is cut off leaves what it knows
    if arguments.memory:
        results = [result if result.problems else replace(result, peak_bytes=weigh(result, device)) for result in results]
        print("Peak memory of a call, its results included:", *map(report.memory_line, results), sep="\n", flush=True)
    out = _write(about, results, arguments)
    if arguments.plot:
        report.plot(arguments.plot, results)
    print(json.dumps(out, ensure_ascii=False))
    return 1 if any(result.problems for result in results) else 0


def _write(about: dict, results: list[Result], arguments: argparse.Namespace) -> dict:
    out = {"machine": about, "runs": arguments.runs, "results": [report.as_dict(result) for result in results]}
    if arguments.json:
        report.write_json(arguments.json, out)
    return out


if __name__ == "__main__":
    sys.exit(main())
