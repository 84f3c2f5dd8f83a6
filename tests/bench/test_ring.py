"""The ring's benchmark and simulation: they agree with what is really sent, refuse what is wrong, and end with JSON."""

import argparse
import json

import pytest
import torch

from bench import __main__ as command
from bench import ring, ring_simulation
from longvita_kernels import plan_context_parallel, ring_attention
from longvita_kernels.ring.cost import CostModel
from tests.ring.support import Threads, shards, tensors, with_gradients

HEADS, DIM = (8, 8), 16
SHAPE = {"heads": HEADS[0], "kv_heads": HEADS[1], "head_dim": DIM}


def outcomes(lengths, ranks, **options):
    found = ring_simulation.simulate(lengths, ranks, CostModel(), dtype=torch.float32, shape=SHAPE, **options)
    return {outcome.scheme: outcome for outcome in found}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("lengths", [[640], [64] * 10, [301, 0, 17, 200, 1]])
def test_simulated_bytes_are_those_that_the_op_sends(ranks, lengths):
    """(In tests/ring/processes.py the same counts are compared on real processes.)"""
    plan = plan_context_parallel([0, *torch.tensor(lengths).cumsum(0).tolist()], ranks)
    inputs = tensors(plan.total_tokens, HEADS, DIM)
    for mode, scheme in (("ring", "ours"), ("all_to_all", "Ulysses")):
        threads = Threads(ranks)

        def rank(member, mode=mode):
            mine = shards(plan, inputs, member.rank)
            attention = lambda *x: (ring_attention(*x, plan, group=member, mode=mode), x[0].sum() * 0)  # noqa: E731
            with_gradients(attention, mine[:3], (mine[3], torch.tensor(1.0)))

        threads.run(rank)
        assert sum(threads.sent) == outcomes(lengths, ranks)[scheme].bytes, scheme


def test_simulated_schemes_stand_as_they_must():
    found = {(row["lengths"], row["ranks"], row["scheme"]): row for row in ring_simulation.report(ranks=(8, 64))["results"]}
    assert len(found) == 3 * (5 + 4)  # 64 ranks do not divide 8 KV heads: no Ulysses
    for row in found.values():
        assert 0 < row["efficiency"] <= 1 and row["seconds"] > 0 and row["exposed"] >= 0 and row["imbalance"] >= 1
    for lengths in ("uniform 4K", "one document", "video and text"):
        for ranks in (8, 64):
            ours, plain, gathered = (found[lengths, ranks, scheme] for scheme in ("ours", "plain ring", "all-gather"))
            assert ours["bytes"] <= gathered["bytes"] <= plain["bytes"] and ours["efficiency"] > plain["efficiency"]
            assert ours["imbalance"] <= 1.05
    assert found["uniform 4K", 8, "ours"]["bytes"] == 0
    # by hand: a causal plain ring waits for whole squares: half and W − 1 of them, of W + (W² − W)/2 pairs' worth
    assert found["one document", 8, "plain ring"]["efficiency"] == pytest.approx((8**2 / 2) / 8 / (0.5 + 7), rel=0.01)


def test_mixtures_have_the_tokens_they_promise():
    for lengths in ring_simulation.mixtures().values():
        assert sum(lengths) == ring_simulation.TOKENS and min(lengths) > 0
    tail = sorted(ring_simulation.mixture(1 << 20))
    assert tail[-1] > 50 * tail[len(tail) // 2]


def test_the_simulation_command_writes_table_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ring_simulation, "report", lambda cost, full=ring_simulation.report: full(cost, (8, 16), 1 << 16))
    arguments = ["ring", "--simulate", "--flops", "1e15", "--bandwidth", "1e11", "1e10", "--json", str(tmp_path / "s.json")]
    assert command.main([*arguments, "--plot", str(tmp_path / "s.png")]) == 0
    kept = json.loads((tmp_path / "s.json").read_text())
    assert kept["hardware"]["flops"] == 1e15 and kept["hardware"]["network_bandwidth"] == 1e10
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(kept["results"])
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.dist
def test_a_small_run_on_two_processes_ends_with_json(capfd, tmp_path):
    arguments = ["ring", "--tokens", "4096", "--rounds", "1", "--dtype", "float32", "--heads", "2", "2", "--dim", "16"]
    assert command.main([*arguments, "--json", str(tmp_path / "ring.json")]) == 0
    out = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert out == json.loads((tmp_path / "ring.json").read_text()) and len(out["results"]) == 3
    for result in out["results"]:
        assert set(result["seconds"]) == {"one process", "ring", "all to all", "zigzag ring"} and not result.get("problems")
        assert result["bytes"]["ring"] < result["bytes"]["zigzag ring"]
        assert result["times_ideal"]["ring"] == pytest.approx(2 * result["seconds"]["ring"] / result["seconds"]["one process"], rel=0.1)


@pytest.mark.dist
def test_a_wrong_op_gets_no_times(monkeypatch):
    monkeypatch.setattr(ring, "ring_attention", lambda *args, **kwargs: ring_attention(*args, **kwargs) * 1.05)
    arguments = argparse.Namespace(device="cpu", peer_copies=False, peers=False, rounds=1)
    case = ring.Case(label="made up", lengths=[100, 60], dtype=torch.float32, heads=2, kv_heads=1, dim=16)
    (result,) = ring._on_processes(2, [case], arguments)
    assert "seconds" not in result and any("ring: rank 1, out differs" in problem for problem in result["problems"])


def test_compute_alone_of_emulated_ranks(capsys):
    arguments = argparse.Namespace(device="cpu", emulate=4, rounds=1)
    result = ring._emulate(ring.Case(label="x", lengths=[600], dtype=torch.float32, heads=2, kv_heads=1, dim=16), arguments)
    one, *ranks = (result["seconds"][name] for name in ("one process", "rank 0", "rank 1", "rank 2", "rank 3"))
    assert len(result["seconds"]) == 5 and result["compute_efficiency"] == pytest.approx(one / 4 / max(ranks))


@pytest.mark.parametrize("arguments", [["--case", "nothing like it"], ["--processes", "1"], ["--rounds", "0"]])
def test_wrong_usage_is_one_line(arguments, capsys):
    assert command.main(["ring", *arguments]) == 2
    assert "no case fits" in capsys.readouterr().err
