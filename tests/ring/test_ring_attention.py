"""ring_attention with many ranks in one process (threads): random plans, dtypes, backends, circumstances, messages."""

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvita_kernels import backends, native, plan_context_parallel, ring_attention, testing
from longvita_kernels.ops import varlen_attention as varlen
from longvita_kernels.ring import all_to_all, attention, partial
from longvita_kernels.ring.cost import CostModel
from longvita_kernels.ring.programs import Call
from tests.ring.support import Threads, gathered, on_one, shards, tensors, with_gradients


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(plan, inputs, threads=None, **options):
    """(out, lse, dq, dk, dv) of all ranks together."""

    def rank(member):
        mine = shards(plan, inputs, member.rank)
        return with_gradients(lambda *x: ring_attention(*x, plan, group=member, return_lse=True, **options), mine[:3], mine[3:])

    return gathered(plan, (threads or Threads(plan.world_size)).run(rank))


def assert_same(got, expected, forward=1e-5, backward=1e-4):
    for (name, a), b in zip(got.items(), expected, strict=True):
        limit = forward if name in ("out", "lse") else backward
        torch.testing.assert_close(a, b, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


def make(lengths, world_size, heads=(4, 2), dim=32, dtype=torch.float32, **options):
    plan = plan_context_parallel([0, *itertools.accumulate(lengths)], world_size, **options)
    return plan, tensors(plan.total_tokens, heads, dim, dtype)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0, 1, 2, 5, 17, 31, 64, 97]), max_size=5),
    st.sampled_from([(2, None), (3, None), (4, None), (6, None), (4, 2), (6, 3)]),
    st.booleans(),
    st.sampled_from([(-1, -1), (0, -1), (5, -1), (40, 3), (-1, 9), (sys.maxsize, sys.maxsize)]),
    st.sampled_from(["balanced", "balanced", "zigzag", "contiguous"]),
    st.sampled_from([(2, 1), (5, 1), (4, 4)]),
    st.booleans(),
)
def test_random_plans_give_what_one_rank_gives(lengths, nodes, causal, window, layout, heads, eager):
    options = {"causal": causal, "window_size": window}
    plan, inputs = make(lengths, nodes[0], heads, 8, layout=layout, ranks_per_node=nodes[1], **options)
    threads = Threads(plan.world_size, eager)
    assert_same(run(plan, inputs, threads, mode="ring"), on_one(plan, inputs, **options))
    sent = [sum(plan.bytes_sent(rank, heads[1], 8, torch.float32, backward=b) for b in (False, True)) for rank in range(plan.world_size)]
    assert threads.sent == sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_are_float32_before_they_are_rounded(dtype):
    """The native results in float32, rounded once, are those in the inputs' dtype, bit for bit."""
    (q, k, v, g, g_lse), cu = tensors(150, (4, 2), 64, dtype), torch.tensor([0, 17, 17, 150], dtype=torch.int32)
    settings = (-1, -1, 0.125, -1, 0, 0.0, False)
    out, lse, rest = varlen._forward_impl(q, k, v, cu, cu, *settings)
    wide = varlen._forward_impl(q, k, v, cu, cu, *settings, result=torch.float32)
    assert wide[0].dtype == torch.float32 and (dtype == torch.float32 or not torch.equal(wide[0], out.float()))
    testing.assert_bit_equal(wide[0].to(dtype), out)
    testing.assert_bit_equal(wide[1], lse)
    arguments = (g, g_lse, q, k, v, out, lse, rest, cu, cu)
    narrow = varlen._backward_impl(*arguments, *settings, [True] * 3)
    wide = varlen.native_backward(*arguments, *settings[2:6], [True] * 3, result=torch.float32)
    for a, b in zip(wide, narrow, strict=True):
        assert a.dtype == torch.float32
        testing.assert_bit_equal(a.to(dtype), b)


def test_float32_gradients_of_many_partitions_too():
    (q, k, v, g, _), cu = tensors(1500, (2, 1), 32, torch.bfloat16), torch.tensor([0, 1500], dtype=torch.int32)
    settings = (-1, -1, 0.2, -1, 0, 0.0, False)
    out, lse, rest = varlen._forward_impl(q, k, v, cu, cu, *settings)
    narrow = varlen._backward_impl(g, None, q, k, v, out, lse, rest, cu, cu, *settings, [True] * 3)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with testing.poisoned_empty():
            wide = varlen.native_backward(g, None, q, k, v, out, lse, rest, cu, cu, *settings[2:6], [True] * 3, result=torch.float32)
        for a, b in zip(wide, narrow, strict=True):
            testing.assert_bit_equal(a.to(torch.bfloat16), b)


def test_the_binding_refuses_other_results():
    (q, *_), cu = tensors(4, (1, 1), 32, torch.bfloat16), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="results come in the dtype of q or in float32"):
        varlen._native_problem(q, q, q, cu, cu, 1.0, -1, -1, 0.0, 1, torch.float16)


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (20, 6)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_torch_shares_are_those_of_the_kernel(backend, window):
    """The fallback differentiates with the lse of all keys, like the kernel, not with its own, and adds to what is there."""
    q, k, v, g, g_lse = tensors(90, (4, 2), 32)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32).numpy() for x in ([0, 40, 40, 90], [0, 30, 35, 90]))
    call = Call([(0, 90)], [(10, 50), (60, 110)], cu_q, cu_k, *window, 0)
    out, lse, rest = partial.forward(q, k, v, call, 0.2, torch.float32)
    lse, rest = lse + 0.7, rest * 0  # as if there were more keys

    def gradients():
        totals = torch.ones(90, 4, 32), torch.ones(120, 2, 32), None
        partial.backward(g, g_lse, q, k, v, out, lse, rest, call, 0.2, *totals)
        return totals[:2]

    kernel = gradients()
    with backends.use(backend):
        torchs = gradients()
    for a, b in zip(torchs, kernel, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert (kernel[1][50:60] == 1).all() and not (kernel[1][:120] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runs_on_the_reference(dtype):
    plan, inputs = make([50, 0, 33, 9], 3, dtype=dtype)
    inputs = [*inputs[:4], inputs[4].to(dtype)]
    with backends.use("reference"):
        got, expected = run(plan, inputs, mode="ring"), on_one(plan, inputs)
    limits = (1e-5, 1e-4) if dtype == torch.float32 else (1e-12, 1e-12)
    assert got["out"].dtype == got["dk"].dtype == dtype
    assert_same(got, expected, *limits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_like_one_rank(dtype):
    plan, inputs = make([700, 3, 321], 8, dtype=dtype, dim=64)
    with backends.use("reference"):
        exact = on_one(plan, [x.double() for x in inputs])
    one = on_one(plan, inputs)
    for (name, a), b, c in zip(run(plan, inputs, mode="ring").items(), one, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - c).norm() <= 1.1 * (b.double() - c).norm(), name


def test_every_buffer_is_written_before_it_is_read():
    plan, inputs = make([200, 1, 99], 4, ranks_per_node=2)
    expected = on_one(plan, inputs)
    with testing.poisoned_empty() as shapes:
        got = run(plan, inputs, mode="ring")
    assert shapes
    assert_same(got, expected)


def test_views_of_one_qkv_tensor():
    plan, _ = make([100, 41], 3)
    qkv = torch.randn(141, 8, 32)
    q, k, v = qkv.split([4, 2, 2], dim=1)
    inputs = (q, k, v, torch.randn(141, 32, 4).transpose(1, 2), torch.randn(141, 4).T)
    assert_same(run(plan, inputs, mode="ring"), on_one(plan, inputs))


@pytest.mark.parametrize("window", [(-1, -1), (30, -1)])
@pytest.mark.parametrize("heads", [(4, 4), (8, 4)])
def test_all_to_all(window, heads):
    plan, inputs = make([300, 0, 55, 1], 4, heads, window_size=window)
    threads = Threads(4)
    got = run(plan, inputs, threads, mode="all_to_all")
    for a, b in zip(got.values(), on_one(plan, inputs, window_size=window), strict=True):
        testing.assert_bit_equal(a, b)
    shape = *heads, 32, torch.float32
    assert threads.sent == [
        sum(all_to_all.bytes_sent(plan, rank, *shape, backward=b, lse=True) for b in (False, True)) for rank in range(4)
    ]


@pytest.mark.parametrize(("lengths", "expected"), [([4] * 64, "ring"), ([256], "all_to_all")])
def test_auto_takes_what_the_cost_model_says(monkeypatch, lengths, expected):
    """Short documents, of which nothing travels; one that is cut, on a slow network."""
    plan, inputs = make(lengths, 4, (4, 4))
    cost, taken = CostModel(node_bandwidth=1e3), []
    for module, name in ((attention, "_forward"), (all_to_all, "attention")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original, name=name: taken.append(name) or original(*a))
    assert cost.choose(plan, 4, 4, 32, torch.float32) == expected
    assert_same(run(plan, inputs, cost=cost), on_one(plan, inputs))
    assert set(taken) == {"_forward" if expected == "ring" else "attention"}


def test_the_gradient_of_unshard_is_summed_in_float32_on_every_rank():
    plan, factors = plan_context_parallel([0, 10], 4), (256.0, 1.0, 1.0, 1.0)  # in bf16 256 + 1 is 256

    def rank(member):
        local = torch.zeros(int(plan.tokens[member.rank]), 2, dtype=torch.bfloat16, requires_grad=True)
        (plan.unshard(local, member) * factors[member.rank]).sum().backward()
        return local.grad

    for grad in Threads(4).run(rank):
        assert grad.dtype == torch.bfloat16 and (grad == torch.tensor(259.0).bfloat16()).all(), grad


def test_autocast_and_scale():
    plan, inputs = make([64, 30], 2)

    def rank(member):
        mine = shards(plan, inputs, member.rank)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ring_attention(*mine[:3], plan, group=member, softmax_scale=0.5, mode="ring")

    out = Threads(2).run(rank)
    assert all(x.dtype == torch.bfloat16 for x in out)
    whole = [x.bfloat16() for x in inputs[:3]]
    cu = torch.tensor([0, 64, 94], dtype=torch.int32)
    expected = varlen.varlen_attention(*whole, cu, softmax_scale=0.5)
    torch.testing.assert_close(torch.cat(out), torch.cat([plan.shard(expected, r) for r in range(2)]), rtol=0, atol=2e-2)


def test_no_second_derivative():
    plan, inputs = make([40], 1)
    q = inputs[0].requires_grad_()
    out = ring_attention(q, *inputs[1:3], plan, group=Threads(1).run(lambda member: member)[0], mode="ring")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="ring_attention has no second derivative.*Remedy"):
        grad.sum().backward()


def test_one_rank_needs_no_exchange_of_keys():
    plan, inputs = make([40, 3], 1)
    threads = Threads(1)
    for (name, a), b in zip(run(plan, inputs, threads).items(), on_one(plan, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    assert threads.sent == [0]


class _Quiet:
    """A group of two whose other member agrees to everything."""

    rank, size, name, eager = 0, 2, "quiet", True

    def exchange(self, step, sends, receives, tag=0):
        assert step == attention.AGREEING, "something was sent"
        for (_, mine), (_, theirs) in zip(sends, receives, strict=True):
            theirs.copy_(mine)
        return self

    def wait(self):
        return None

    finish = wait


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {0: torch.zeros(19, 4, 32)},
            {},
            r"q has shape \(19, 4, 32\); expected \(T, Hq, D\), T the tokens that the plan gives this rank = \(20",
        ),
        ({1: torch.zeros(20, 2, 24)}, {}, r"k has shape \(20, 2, 24\); expected \(T, Hkv, D\)"),
        ({2: torch.zeros(20, 1, 32)}, {}, r"v has shape \(20, 1, 32\); expected the shape of k"),
        ({2: torch.zeros(20, 2, 32, dtype=torch.bfloat16)}, {}, "v has dtype torch.bfloat16 but q has torch.float32"),
        ({0: torch.zeros(20, 3, 32)}, {}, "q has 3 heads and k has 2; expected the query heads to be a multiple"),
        ({0: torch.zeros(20, 4, 64)[..., ::2]}, {}, "q has stride 2 in its last dimension"),
        ({3: "plan"}, {}, "plan is a str; expected what plan_context_parallel returns"),
        ({3: plan_context_parallel([0, 60], 3)}, {}, "the plan is for 3 ranks but the group has 2; plan with world_size=2"),
        ({}, {"mode": "both"}, "mode is 'both'; expected one of auto, ring, all_to_all"),
        ({1: torch.zeros(20, 1, 32), 2: torch.zeros(20, 1, 32)}, {"mode": "all_to_all"}, "1 KV heads over 2 ranks, which must divide both"),
        ({}, {"softmax_scale": float("nan")}, "softmax_scale is nan"),
    ],
)
def test_wrong_arguments_are_explained(change, options, message):
    arguments = [torch.zeros(20, 4, 32), torch.zeros(20, 2, 32), torch.zeros(20, 2, 32), plan_context_parallel([0, 40], 2)]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        ring_attention(*arguments, group=_Quiet(), **options)


def test_without_a_process_group():
    with pytest.raises(ValueError, match="there is no process group; call torch.distributed.init_process_group first"):
        ring_attention(*[torch.zeros(4, 1, 32)] * 3, plan_context_parallel([0, 4], 1))
    plan = plan_context_parallel([0, 4], 1)
    with pytest.raises(ValueError, match="local has 3 tokens; expected the 4 that rank 0 owns"):
        plan.unshard(torch.zeros(3), Threads(1).run(lambda member: member)[0])


def test_the_native_kernel_was_used():
    assert native.load() is not None  # or the tests above would compare the reference with itself
