"""Plans: who owns what, who needs what, how it gets there, against definitions written out for small documents."""

import itertools
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import ring_simulation
from longvita_kernels import plan_context_parallel
from longvita_kernels.ring.cost import CostModel
from tests import counting

MILLION = 1 << 20


def offsets(lengths):
    return [0, *itertools.accumulate(lengths)]


def visible(lengths, causal, window):
    """(T, T): whether a query sees a key, written out."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths] or [np.zeros(0, dtype=int)])
    left, right = window[0], 0 if causal else window[1]
    seen = document[:, None] == document
    distance = position - position[:, None]
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def tokens_of(ranges):
    return [t for a, b in np.asarray(ranges).tolist() for t in range(a, b)]


plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.sampled_from([0, 1, 2, 3, 7, 13, 31, 64, 97]), max_size=6),
        "nodes": st.sampled_from([(1, None), (2, None), (3, None), (5, None), (8, None), (4, 2), (6, 3), (8, 4)]),
        "causal": st.booleans(),
        "window": st.sampled_from([(-1, -1), (0, -1), (5, -1), (40, 3), (-1, 0), (-1, 9), (12, 12), (sys.maxsize, sys.maxsize)]),
        "layout": st.sampled_from(["balanced", "balanced", "zigzag", "contiguous"]),
    }
)


def plan_of(drawn):
    world_size, per_node = drawn["nodes"]
    return plan_context_parallel(
        offsets(drawn["lengths"]),
        world_size,
        causal=drawn["causal"],
        window_size=drawn["window"],
        layout=drawn["layout"],
        ranks_per_node=per_node,
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(plans)
def test_random_plans_own_everything_once_and_get_what_they_need_and_no_more(drawn):
    plan, seen = plan_of(drawn), visible(drawn["lengths"], drawn["causal"], drawn["window"])
    own = [tokens_of(part) for part in plan.slices]
    assert sorted(sum(own, [])) == list(range(plan.total_tokens))
    assert plan.tokens.tolist() == [len(x) for x in own] and max(map(len, own)) - min(map(len, own)) <= 1
    assert plan.areas.tolist() == [int(seen[x].sum()) for x in own]
    held = [set(x) for x in own]
    routes = plan.routes
    for rank in range(plan.world_size):
        needed = set(np.flatnonzero(seen[own[rank]].any(0)).tolist()) if own[rank] else set()
        assert tokens_of(plan.key_ranges(rank)) == sorted(needed - held[rank])
        rows = routes.target == rank
        assert plan.tokens_received(rank) == len(needed - held[rank]) == int((routes.stop[rows] - routes.start[rows]).sum())  # each once
    # what a rank sends it owns, or got in a step before this one leaves
    arrival = [dict.fromkeys(x, 0) for x in own]
    for source, target, start, stop, step in zip(routes.source, routes.target, routes.start, routes.stop, routes.step, strict=True):
        assert source != target and all(arrival[source][t] <= routes.sent_at[step] for t in range(start, stop))
        arrival[target] |= dict.fromkeys(range(start, stop), step)
    assert sum(call.area for rank in range(plan.world_size) for step in plan.program(rank).steps for call in step.calls) == seen.sum()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(plans)
def test_between_nodes_a_key_travels_once_to_each_node(drawn):
    plan = plan_of(drawn)
    routes, per_node = plan.routes, plan.ranks_per_node
    crossing = routes.source // per_node != routes.target // per_node
    rows = zip(routes.target[crossing] // per_node, routes.start[crossing], routes.stop[crossing], strict=True)
    reached = [(int(node), t) for node, a, b in rows for t in range(a, b)]
    assert len(reached) == len(set(reached))
    assert sum(plan.tokens_sent(r, across_nodes=True) for r in range(plan.world_size)) == len(reached)


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("per_node", [None, 8])
@pytest.mark.parametrize("name", ["uniform 4K", "one document", "video and text"])
def test_a_million_tokens_are_balanced(name, ranks, per_node):
    plan = plan_context_parallel(offsets(ring_simulation.mixtures(MILLION)[name]), ranks, ranks_per_node=per_node)
    assert plan.imbalance <= 1.02 and plan.tokens.max() - plan.tokens.min() <= 1
    assert sum(len(part) for part in plan.slices) <= 2 * ranks and max(len(part) for part in plan.slices) <= 8


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("name", ["uniform 4K", "one document", "video and text"])
def test_planning_costs_no_more_for_more_tokens_and_documents(name, ranks):
    """Four times as many of both. Plans of other shapes differ by a quarter in their function calls; a loop over documents, or an array
    over tokens, would cost four times as much. `python -m bench host --case planning` measures the time."""
    small, large = (offsets(ring_simulation.mixtures(tokens)[name]) for tokens in (MILLION // 4, MILLION))
    plan_context_parallel(small, ranks)  # whatever happens only once
    for cost in (counting.calls, counting.peak_bytes):
        few, many = (cost(lambda cu=cu: plan_context_parallel(cu, ranks)) for cu in (small, large))
        assert many <= 1.5 * few, (cost.__name__, few, many)


@pytest.mark.parametrize("seed", range(4))
def test_other_mixtures_and_windows_are_balanced_too(seed):
    cu = offsets(ring_simulation.mixture(MILLION, seed + 1))
    for options in ({}, {"causal": False}, {"window_size": (4096, -1)}):
        for ranks in (8, 64):
            plan = plan_context_parallel(cu, ranks, **options)
            assert plan.imbalance <= 1.05, (options, ranks)


def test_a_plan_is_the_same_every_time():
    cu = offsets(ring_simulation.mixture(MILLION))
    first, second = (plan_context_parallel(cu, 16, ranks_per_node=4) for _ in range(2))
    assert first.fingerprint == second.fingerprint and all(np.array_equal(a, b) for a, b in zip(first.slices, second.slices, strict=True))
    assert first.fingerprint not in [
        plan_context_parallel(cu, 16, ranks_per_node=g, causal=c).fingerprint for g, c in ((4, False), (8, True))
    ]


@pytest.mark.parametrize("documents", [25, 31, 32, 57, 100])
def test_packed_documents_send_at_most_a_quarter_of_a_plain_ring(documents):
    plan = plan_context_parallel(offsets([4096] * documents), 8)
    sent = sum(plan.bytes_sent(rank, 8, 128, torch.bfloat16) for rank in range(8))
    assert sent <= 0.25 * 7 * plan.total_tokens * 2 * 8 * 128 * 2
    assert plan.imbalance <= 1.05


@pytest.mark.parametrize(("ranks", "causal"), [(8, True), (8, False), (64, True)])
def test_one_document_sends_no_more_than_an_all_gather(ranks, causal):
    plan = plan_context_parallel([0, MILLION], ranks, causal=causal)
    sent = sum(plan.tokens_sent(rank) for rank in range(ranks))
    assert sent <= (0.76 if causal else 1.0) * (ranks - 1) * MILLION


def test_documents_stay_inside_nodes():
    flat, nodes = (plan_context_parallel(offsets([65536] * 16), 64, ranks_per_node=g) for g in (None, 8))
    assert sum(nodes.tokens_sent(rank, across_nodes=True) for rank in range(64)) == 0
    assert sum(nodes.tokens_sent(rank) for rank in range(64)) <= sum(flat.tokens_sent(rank) for rank in range(64)) > 0


def test_short_documents_and_windows_take_one_step():
    assert plan_context_parallel(offsets([4096] * 100), 8).routes.steps == 1
    assert plan_context_parallel([0, MILLION], 8, window_size=(4096, -1)).routes.steps == 1
    assert plan_context_parallel([0, MILLION], 8).routes.steps == 7


def test_one_call_a_step_for_documents_without_a_window():
    for cu in ([0, MILLION], offsets(ring_simulation.mixture(MILLION)), offsets([1000] * 300)):
        plan = plan_context_parallel(cu, 8)
        assert max(len(step.calls) for rank in range(8) for step in plan.program(rank).steps) <= 2


def test_bytes_are_those_of_keys_values_and_their_gradients():
    plan = plan_context_parallel([0, 1000], 2)
    for rank in range(2):
        sent, received = plan.tokens_sent(rank), plan.tokens_received(rank)
        assert plan.bytes_sent(rank, 2, 64, torch.bfloat16) == sent * 2 * 2 * 64 * 2
        assert plan.bytes_sent(rank, 2, 64, torch.bfloat16, backward=True) == sent * 2 * 2 * 64 * 2 + received * 2 * 2 * 64 * 4


def test_shards_and_positions():
    plan = plan_context_parallel([0, 300, 300, 1000], 4)
    x = torch.randn(1000, 3, requires_grad=True)
    shards = [plan.shard(x, rank) for rank in range(4)]
    order = torch.cat([torch.tensor(tokens_of(part)) for part in plan.slices])
    assert torch.equal(torch.cat(shards), x[order])
    (grad,) = torch.autograd.grad(shards[1].sum(), x)
    assert grad.sum() == 3 * plan.tokens[1]
    assert torch.equal(plan.shard(x.T, 2, dim=1), shards[2].T)
    packed = torch.cat([torch.arange(300), torch.arange(700)])
    assert all(torch.equal(plan.position_ids(rank), plan.shard(packed, rank)) for rank in range(4))
    assert plan.position_ids(0).dtype == torch.int64


def test_drawing():
    plan = plan_context_parallel([0, 64, 128], 2, layout="contiguous")
    lines = plan.draw(width=16).splitlines()
    assert lines[0] == "128 tokens, 2 documents, 2 ranks, contiguous: area 1.000, tokens 1.000 × the mean"
    assert lines[1].split() == ["┊", "┊"]
    assert lines[2] == "   0  ████████········  64 own, 0 received"
    drawn = plan_context_parallel([0, 128], 4, ranks_per_node=2).draw(width=32)
    assert "on 2 nodes" in drawn and "░" in drawn
    for line, rank in zip(drawn.splitlines()[2:], range(4), strict=True):
        assert re.match(rf"   {rank}  [█░·]{{32}}  32 own, \d+ received", line)


def test_the_cost_model_chooses():
    short, long = plan_context_parallel(offsets([4096] * 64), 8), plan_context_parallel([0, 1 << 18], 8)
    shape = (40, 8, 128, torch.bfloat16)
    assert CostModel().choose(short, *shape) == "ring"  # nothing to send
    assert CostModel(node_bandwidth=1e9).choose(long, *shape) == "all_to_all"  # a slow network: fewer bytes
    assert CostModel(node_bandwidth=1e9).choose(long, 40, 4, 128, torch.bfloat16) == "ring"  # 4 KV heads on 8 ranks
    ring = CostModel().ring(long, *shape)
    assert ring.seconds >= ring.ideal > 0 and 0.9 < ring.efficiency <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 5], 0), "world_size is 0; expected the number of ranks"),
        (([1, 5], 2), "cu_seqlens starts at 1; expected 0"),
        (([0, 5, 3], 2), "cu_seqlens falls from 5 to 3 at index 2"),
        (([[0, 5]], 2), r"expected \(n_docs \+ 1,\) integers"),
        ((torch.tensor([0.0, 5.0]), 2), "cu_seqlens has dtype torch.float32; expected int32"),
        (([0, 5], 2, {"layout": "random"}), "layout is 'random'; expected one of balanced, zigzag, contiguous"),
        (([0, 5], 4, {"ranks_per_node": 3}), "ranks_per_node is 3; expected a divisor of world_size = 4"),
        (([0, 5], 4, {"window_size": (-2, 0)}), r"window_size is \(-2, 0\)"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    *positional, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        plan_context_parallel(*positional, **options)


def test_wrong_shards_and_rates_are_explained():
    plan = plan_context_parallel([0, 10], 2)
    with pytest.raises(ValueError, match="x has 9 entries along dimension 0; expected the 10 tokens of the plan"):
        plan.shard(torch.zeros(9), 0)
    with pytest.raises(ValueError, match="rank is 2; expected 0 to 1"):
        plan.shard(torch.zeros(10), 2)
    with pytest.raises(ValueError, match="flops is 0; expected a rate above 0"):
        CostModel(flops=0)
