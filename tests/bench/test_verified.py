"""The README's table of what is verified where, and `backends.VERIFIED`, against the results."""

import json

import pytest

from bench import verified
from longvita_kernels import backends
from longvita_kernels.backends import Verified


def test_the_readme_says_what_the_results_say():
    page = verified.README.read_text()
    assert verified.rewritten(page, verified.block()) == page, "run: python -m bench.verified"


def test_every_default_on_a_gpu_has_tests_that_passed():
    assert verified.problems(backends.VERIFIED, verified.load()) == []


@pytest.fixture
def results(tmp_path):
    """As left by bench/gpu.sh on an H100, beside what was compiled."""
    counts = {
        "merge_attention triton": {"passed": 9},
        "append_kv triton": {"passed": 3, "failed": 1},
        "decode_attention cuda": {"passed": 2},
    }
    speed = [{"op": "merge_attention", "ceiling": "copy", "share": share} for share in (0.91, 0.85, None)]
    files = {
        "tests-h100.json": {"machine": {"architecture": "sm_90"}, "tests": counts},
        "merge-h100.json": {"machine": {"architecture": "sm_90"}, "results": speed},
        "compile.json": {"kernels": {"merge_attention forward": {"sm_80": {}, "sm_90": {}}}},
        "zen4.json": {"machine": {}, "results": [{"op": "merge_attention", "ceiling": "read", "share": 0.5}]},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    return verified.load(tmp_path)


@pytest.mark.parametrize(
    ("op", "architecture", "result", "words"),
    [
        ("merge_attention", "sm_90", "bench/results/tests-h100.json", None),
        ("merge_attention", "sm_90", "bench/results/tests-b200.json", "bench/results/tests-b200.json is not there"),
        ("merge_attention", "sm_90", "tests-h100.json", "tests-h100.json is not there"),
        ("merge_attention", "sm_100", "bench/results/tests-h100.json", "comes from sm_90"),
        ("append_kv", "sm_90", "bench/results/tests-h100.json", "its tests did not pass in"),
        ("decode_attention", "sm_90", "bench/results/tests-h100.json", "its tests did not pass in"),  # those of another backend did
        ("merge_attention", "sm_90", "bench/results/merge-h100.json", "its tests did not pass in"),
        ("merge_attention", "sm_90", "bench/results/compile.json", "comes from None"),
    ],
)
def test_a_default_without_tests_is_told(results, op, architecture, result, words):
    found = verified.problems({(op, architecture): (Verified("triton", result),)}, results)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0] and op in found[0])


def test_cells(results):
    default = {("merge_attention", "sm_90"): (Verified("triton", "bench/results/tests-h100.json"),)}
    link = "(bench/results/tests-h100.json)"
    assert verified.cell("merge_attention", "sm_90", results, default) == f"[`triton`]{link}; 0.85 to 0.91 × copy"
    assert verified.cell("merge_attention", "sm_90", results, {}) == f"`triton` [passed, no default]{link}; 0.85 to 0.91 × copy"
    assert verified.cell("append_kv", "sm_90", results, {}) == f"`triton` [failed]{link}"
    assert verified.cell("merge_attention", "sm_80", results, {}) == "compiled, never run"
    assert verified.cell("append_kv", "sm_80", results, {}) == "never run"
    assert verified.speed("merge_attention", "cpu", results) == ["0.50 × read"]


def test_failed_tests_on_a_cpu_and_other_architectures_show(results):
    tests = "**5 passed**, exit status 1, 3 s.\nSome CPU, 2 cores; instruction sets portable, avx2; Python 3.11"
    results["tests-l40.json"] = {"machine": {"architecture": "sm_89"}, "tests": {}}
    lines = verified.table(results, tests, {}).splitlines()
    assert lines[0] == "| op | CPU, `native` | sm_80 | sm_89 | sm_90 | sm_100 |"
    assert next(line for line in lines if line.startswith("| merge_attention |")).split(" | ")[1] == "tests FAILED; 0.50 × read"
    assert "CPU: every instruction set (portable, avx2) on Some CPU, see" in lines and "**No kernel" not in "".join(lines)
    del results["tests-l40.json"], results["tests-h100.json"], results["merge-h100.json"]
    assert "**No kernel of ours has run on a GPU yet.**" in verified.table(results, tests, {})


def test_the_block_is_replaced_and_nothing_else():
    page = f"a\n{verified.START}\nold\n{verified.END}\nb\n"
    new = f"{verified.START}\nnew\n{verified.END}"
    assert verified.rewritten(page, new) == f"a\n{new}\nb\n" == verified.rewritten(verified.rewritten(page, new), new)
    with pytest.raises(ValueError, match="no place for the table"):
        verified.rewritten("a\n", new)
