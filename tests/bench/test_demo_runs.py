"""The page of kept demo runs says what the kept reports say."""

import copy

import pytest

from bench import demo_runs

PART = {"accuracy": 0.9, "questions": 100, "interval": [0.83, 0.94]}
REPORT = {
    "plan": "default", "image_accuracy": 0.99, "image_interval": [0.97, 1.0], "image_questions": 360, "peak_rss_bytes": 2**30,
    "goals": {"images": 0.95, "video": 0.85, "text": 0.8, "recall": 0.95},
    "learned": {"recall": True, "images": True, "video": True, "text": True}, "pretraining": {"rounds": 2},
    "needle": {kind: {"full_length": PART, "needle_removed": {**PART, "accuracy": 0.1}} for kind in demo_runs.KINDS},
    "seconds": {"total": 480.0}, "estimated": {"total": 500.0},
    "machine": {
        "processor": "A", "threads": 2, "instruction_set": "avx2", "torch_capability": "AVX2", "torch_capability_cap": "avx2",
        "matmul_gflops": 100.0,
    },
}  # fmt: skip
ALONE = {
    "plan": "default", "recall": {"text": 1.0, "video": 0.97}, "draws": 1, "rounds": 1, "learned": True, "seconds": 50.0,
    "machine": REPORT["machine"],
}  # fmt: skip


def test_the_page_is_up_to_date():
    assert demo_runs.PAGE.read_text() == demo_runs.page(demo_runs.kept()), "run: python -m bench.demo_runs"


def test_a_row_says_what_its_report_says():
    text = demo_runs.page({"seed7": REPORT, "pretrain-seed7": ALONE})
    where = "A, 2 threads, avx2, torch capped at AVX2"
    found = "0.90 (0.83–0.94)"
    removed = "0.10 (0.83–0.94)"
    row = f"| seed7 | {where} | 0.990 (0.97–1.00) | {found} | {found} | {removed} | {removed} | 2 | 8.0 (8.3) | 48 | 1.00 |"
    assert row in text.splitlines()
    assert f"| pretrain-seed7 | {where} | 1.000 | 0.970 | 1, 1 | yes | 50 |" in text.splitlines()


@pytest.mark.parametrize("what", ["recall", "images", "video", "text"])
def test_what_was_not_learned_stands_out(what):
    report = copy.deepcopy(REPORT)
    report["learned"][what] = False
    assert demo_runs.page({"seed7": report}).count("**not learned**") == 1
    assert "**no**" in demo_runs.page({"a": {**ALONE, "learned": False}})
