"""Real processes over gloo against one: the results, the bytes, what is said when ranks disagree, die or hang."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ring.processes import CASES, SIZES, SLOW

ROOT = Path(__file__).parents[2]


def start(folder, what):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ring.processes", str(folder), what],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return start(tmp_path_factory.mktemp("ring"), "quick")


def check_results(found, cases):
    for name, case in cases.items():
        results = {size: found.get(f"{size}: {name}") for size in SIZES}
        nodes, all_to_all = case.get("ranks_per_node", 1), case.get("mode") == "all_to_all"
        sizes = [size for size in SIZES if size % nodes == 0 and not (all_to_all and 8 % size)]
        assert [size for size, result in results.items() if result] == sizes, name
        for size in sizes:
            errors, wrong = results[size]["errors"], results[size]["wrong_bytes"]
            assert wrong == 0, f"{size} processes, {name}: {wrong} ranks sent other bytes than the plan foretells"
            assert errors["out"] <= 1e-5 and errors["lse"] <= 1e-5, f"{size} processes, {name}: {errors}"
            assert max(errors["dq"], errors["dk"], errors["dv"]) <= 1e-4, f"{size} processes, {name}: {errors}"


def check_bf16(found):
    ratios = found["8: bf16, errors over those of one process"]
    assert set(ratios) == {"out", "lse", "dq", "dk", "dv"} and max(ratios.values()) <= 1.1, ratios


@pytest.mark.dist
def test_groups_of_2_3_4_and_8_equal_one_process(quick):
    check_results(quick[1], CASES)


@pytest.mark.dist
def test_bf16_errs_no_more_over_8_steps_than_in_one_process(quick):
    check_bf16(quick[1])


@pytest.mark.dist
def test_repeated_runs_agree_in_every_bit(quick):
    assert [quick[1][f"repeated, {layout}"]["differing"] for layout in ("balanced", "zigzag")] == [0, 0]


@pytest.mark.dist
def test_checkpointing_no_grad_frozen_inputs_and_unshard(quick):
    assert quick[1]["circumstances"] == dict.fromkeys(("checkpoint", "no_grad", "inference", "frozen", "unshard"), True)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("plan", "another plan"), ("dtype", "another dtype"), ("head dimension", "another head dimension"),
        ("scale", "another softmax_scale"), ("tokens", "arguments that do not fit"),
    ],
)  # fmt: skip
def test_ranks_that_disagree_are_told_before_anything_is_sent(quick, what, words):
    for rank, said in enumerate(quick[1][f"mismatch, {what}"]["said"]):
        if what == "tokens" and rank == 1:  # the one that is wrong by itself
            assert re.search(r"q has shape \(49, 4, 32\); expected .* = \(50,", said), said
        else:
            assert re.search(rf"rank {1 - rank} called ring_attention with {words}, unlike rank {rank}", said), said
        assert said.endswith("[72 bytes]"), said  # the comparison itself


@pytest.mark.dist
def test_arguments_are_compared_once_a_plan(quick):
    agreements = quick[1]["agreements"]
    assert agreements["bytes"] == agreements["once"] > 0


@pytest.mark.dist
@pytest.mark.parametrize(("name", "lost", "others"), [("hung", 2, 2), ("killed", 7, 7)])
def test_a_lost_peer_ends_the_others_with_its_name_and_the_step(quick, name, lost, others):
    """A peer that hangs ends the others by the time-out of their group; one that is killed, by its closed connection, at once."""
    said = [(quick[0] / f"{name}-{rank}.txt").read_text() for rank in range(others)]
    for rank, one in enumerate(said):
        step = r"ring_attention, (forward|backward), (keys|gradients) of step \d+: (receiving from|sending to) rank \d"
        form = f"rank {rank} of {others + 1}, {step}"
        assert re.match(form, one), one
        assert ("Timed out" in one) == (name == "hung"), one
    assert any(f"from rank {lost} failed; a peer has died, hangs" in one for one in said), said


@pytest.mark.dist
@pytest.mark.slow
def test_larger_documents_and_20_runs(tmp_path):
    _, found = start(tmp_path, "slow")
    check_results(found, SLOW)
    check_bf16(found)
    assert [found[f"repeated, {layout}"]["differing"] for layout in ("balanced", "zigzag")] == [0, 0]
