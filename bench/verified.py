"""What is verified on which hardware, from what the tests and benchmarks left behind: python -m bench.verified

Writes the table in README.md between its two markers; tests/bench/test_verified.py fails while the two disagree, and while an entry of
`backends.VERIFIED` has no tests that passed. A column is a machine with its CPU or a GPU's architecture, a row an op.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from longvita_kernels import backends
from longvita_kernels.spec import all_specs

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, TESTS = ROOT / "README.md", ROOT / "bench" / "results", ROOT / "tests" / "RESULTS.md"
START, END = "<!-- verified: written by python -m bench.verified -->", "<!-- /verified -->"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # have a column even where nothing has run


def load(folder: Path = RESULTS) -> dict[str, dict]:
    """{file name: content} of the results."""
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _architecture(result: dict) -> str | None:
    """The GPU's that a result was made on; "cpu"; None: no machine ran it."""
    return result["machine"].get("architecture", "cpu") if "machine" in result else None


def passed(result: dict, op: str, backend: str) -> bool:
    """Whether tests/gpu ran this op on this backend, and nothing of it failed."""
    counts = result.get("tests", {}).get(f"{op} {backend}", {})
    return counts.get("passed", 0) > 0 and set(counts) <= {"passed", "skipped"}


def problems(verified: dict, results: dict[str, dict]) -> list[str]:
    """What `backends.VERIFIED` claims and the results do not say, in words."""
    wrong = []
    for (op, architecture), entries in verified.items():
        for entry in entries:
            result = results.get(Path(entry.result).name, {})
            name = f"VERIFIED[{op!r}, {architecture!r}] {entry.backend}"
            if entry.result != f"bench/results/{Path(entry.result).name}" or not result:
                wrong.append(f"{name}: {entry.result} is not there")
            elif _architecture(result) != architecture:
                wrong.append(f"{name}: {entry.result} comes from {_architecture(result)}")
            elif not passed(result, op, entry.backend):
                wrong.append(f"{name}: its tests did not pass in {entry.result}")
    return wrong


def speed(op: str, architecture: str, results: dict[str, dict]) -> list[str]:
    """Shares of the ceilings reached, from the least to the most of all cases."""
    shares: dict[str, list] = {}
    for result in results.values():
        for case in result.get("results", []) if _architecture(result) == architecture else ():
            if case.get("op") == op and case.get("share") is not None:
                shares.setdefault(case["ceiling"], []).append(case["share"])
            elif op == "ring_attention" and "times_ideal" in case:
                shares.setdefault("ideal", []).append(1 / case["times_ideal"]["ring"])
    return [f"{_range(found)} × {ceiling}" for ceiling, found in sorted(shares.items())]


def _range(numbers):
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return low if low == high else f"{low} to {high}"


def cell(op: str, architecture: str, results: dict[str, dict], verified: dict) -> str:
    """What is known of an op on a GPU, in a few words."""
    ran = {name: result for name, result in results.items() if _architecture(result) == architecture and "tests" in result}
    known = {key.split()[1]: name for name, result in ran.items() for key in result["tests"] if key.split()[0] == op}
    entries = verified.get((op, architecture), ())
    words = [f"[`{entry.backend}`]({entry.result})" for entry in entries]
    for backend, name in known.items():
        if backend not in {entry.backend for entry in entries}:
            words.append(f"`{backend}` [{'passed, no default' if passed(ran[name], op, backend) else 'failed'}](bench/results/{name})")
    if words:
        return "; ".join(words + speed(op, architecture, results))
    kernels = results.get("compile.json", {"kernels": {}})["kernels"]
    compiled = any(op in name and architecture in found for name, found in kernels.items())
    return "compiled, never run" if compiled else "never run"


def table(results: dict[str, dict], tests: str, verified: dict) -> str:
    """The table. tests: what `make test-all` wrote."""
    status = re.search(r"exit status (\d+)", tests)[1]
    cpu, instruction_sets = re.search(r"^(.*), \d+ cores; instruction sets ([^;]+);", tests, re.MULTILINE).groups()
    seen = {_architecture(result) for result in results.values()} - {None, "cpu"}
    architectures = sorted({*ARCHITECTURES, *seen}, key=lambda name: int(name.removeprefix("sm_")))
    lines = [f"| op | CPU, `native` | {' | '.join(architectures)} |", "|---" * (2 + len(architectures)) + "|"]
    for op in [*all_specs(), "ring_attention"]:
        of_cpu = "; ".join(["passed" if status == "0" else "tests FAILED", *speed(op, "cpu", results)])
        lines.append(f"| {op} | {of_cpu} | {' | '.join(cell(op, name, results, verified) for name in architectures)} |")
    never = "" if seen else "**No kernel of ours has run on a GPU yet.** "
    about = f"""{never}CPU: every instruction set ({instruction_sets}) on {cpu}, see
[tests/RESULTS.md](tests/RESULTS.md). Speeds are shares of torch.mm in the same dtype, of reading memory, or (ideal) of what two processes
could reach, over all cases of [bench/results](bench/results/README.md)."""
    return "\n".join([*lines, "", about])


def block() -> str:
    """The block between the markers, as it should be."""
    return f"{START}\n\n{table(load(), TESTS.read_text(), backends.VERIFIED)}\n\n{END}"


def rewritten(text: str, new: str) -> str:
    """A page with its block replaced."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md has no place for the table; expected one line {START!r} and, below, one {END!r}")
    return text[: text.index(START)] + new + text[text.index(END) + len(END) :]


def main() -> int:
    README.write_text(rewritten(README.read_text(), block()))
    wrong = problems(backends.VERIFIED, load())
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
