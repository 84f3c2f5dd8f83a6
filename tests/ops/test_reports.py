"""Faults that users of other kernels have reported, tried here: each right value comes from torch in float64, written out in this file."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from longvita_kernels import (
    append_kv,
    backends,
    decode_attention,
    linear_cross_entropy,
    masked_lm_head,
    merge_attention,
    pixel_shuffle_projection,
    plan_context_parallel,
    varlen_attention,
)

each_backend = pytest.mark.parametrize("backend", ["native", "torch", "reference"])
REDUCTIONS = ("sum", "mean", "none")


def loss_inputs(tokens=12, width=16, vocab=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, width, generator=generator), torch.randn(vocab, width, generator=generator)
    return hidden, weight, torch.randint(vocab, (tokens,), generator=generator)


# ---- linear_cross_entropy ----


@each_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight")])
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_supervised_gives_gradient_zero_whatever_is_frozen(backend, reduction, low_memory, trained, tokens):
    backends.use(backend)
    hidden, weight, _ = loss_inputs(tokens)
    leaves = {"hidden": hidden.requires_grad_("hidden" in trained), "weight": weight.requires_grad_("weight" in trained)}
    labels = torch.full((tokens,), -100)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, low_memory=low_memory)
    assert loss.shape == ((tokens,) if reduction == "none" else ()) and not loss.any()
    loss.sum().backward()
    for name in trained:
        assert torch.equal(leaves[name].grad, torch.zeros_like(leaves[name]))


def test_nothing_supervised_with_a_frozen_head_compiles():
    hidden, weight, _ = loss_inputs()
    compiled = torch.compile(lambda h, y: linear_cross_entropy(h, weight, y, reduction="none").sum(), fullgraph=True, backend="aot_eager")
    compiled(hidden.requires_grad_(), torch.full((12,), -100)).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@each_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_weight_of_an_ignored_row_does_not_matter(backend, reduction, low_memory, bad):
    backends.use(backend)
    hidden, weight, labels = loss_inputs()
    labels[3], loss_weight = -100, torch.rand(12)
    clean = linear_cross_entropy(hidden, weight, labels, reduction=reduction, loss_weight=loss_weight, low_memory=low_memory)
    loss_weight[3] = bad
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, loss_weight=loss_weight, low_memory=low_memory)
    torch.testing.assert_close(loss.detach(), clean)
    loss.sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[3].any()


def test_the_weight_of_an_ignored_row_does_not_matter_when_compiled():
    hidden, weight, labels = loss_inputs()
    labels[3], loss_weight = -100, torch.rand(12)
    clean = linear_cross_entropy(hidden, weight, labels, reduction="mean", loss_weight=loss_weight)
    loss_weight[3] = math.nan
    compiled = torch.compile(
        lambda h, w: linear_cross_entropy(h, weight, labels, reduction="mean", loss_weight=w), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(hidden.requires_grad_(), loss_weight).detach(), clean)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_mean_over_weights_that_may_cancel_is_refused(gradient):
    hidden, weight, labels = loss_inputs()
    labels[0] = -100
    advantages = torch.linspace(-1, 1, 12)
    hidden.requires_grad_(gradient)
    with pytest.raises(ValueError, match=r"loss_weight\[1\] is -0.8.*expected weights of at least 0 .*Remedy: reduction='sum'"):
        linear_cross_entropy(hidden, weight, labels, reduction="mean", loss_weight=advantages)
    each = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    loss = linear_cross_entropy(hidden, weight, labels, loss_weight=advantages)
    torch.testing.assert_close(loss.double(), (each * advantages.double()).sum(), atol=1e-5, rtol=1e-5)
    advantages[1:] = advantages[1:].abs()
    linear_cross_entropy(hidden, weight, labels, reduction="mean", loss_weight=advantages)  # the ignored row's sign does not matter


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"softcap": 3.0}, {"loss_weight": torch.rand(12)}])
def test_the_loss_and_its_gradient_run_on_fake_tensors(reduction, options):
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden, weight = torch.randn(12, 16, requires_grad=True), torch.randn(37, 16, requires_grad=True)
        linear_cross_entropy(hidden, weight, torch.randint(37, (12,)), reduction=reduction, **options).sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_the_loss_and_its_gradient_are_traced(mode):
    def gradients(hidden, weight, labels):
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, reduction="mean"), (hidden, weight))

    def inputs(tokens):
        hidden, weight, labels = loss_inputs(tokens)
        labels[2] = -100
        return hidden.requires_grad_(), weight.requires_grad_(), labels

    traced = make_fx(gradients, tracing_mode=mode)(*inputs(12))
    other = inputs(17 if mode == "symbolic" else 12)
    for got, expected in zip(traced(*other), gradients(*other), strict=True):
        torch.testing.assert_close(got, expected)


# ---- merge_attention ----


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_part_of_a_row_that_saw_nothing_is_not_read(backend, dtype):
    """Memory that nobody has written may hold NaN, in the part and in what comes back for it."""
    backends.use(backend)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, 3, 16, generator=generator).to(dtype)
    lse_a, lse_b = torch.randn(2, 3, 6, generator=generator)
    lse_a[:, 1], lse_b[:, 2], lse_a[:, 4], lse_b[:, 4] = (-math.inf,) * 4
    a[1], b[2], a[4], b[4] = (math.nan,) * 4
    inputs = [x.clone().requires_grad_() for x in (a, lse_a, b, lse_b)]
    out, lse = merge_attention(*inputs)
    assert torch.equal(out[1], b[1]) and torch.equal(out[2], a[2]) and not out[4].any()
    (out.float().sum() + lse[:, [0, 1, 2, 3, 5]].sum()).backward()
    grad_a, grad_lse_a, grad_b, grad_lse_b = (x.grad for x in inputs)
    assert all(grad.isfinite().all() for grad in (grad_a, grad_lse_a, grad_b, grad_lse_b))
    for grad, rows in ((grad_a, [1, 4]), (grad_b, [2, 4]), (grad_lse_a.T, [1, 4]), (grad_lse_b.T, [2, 4])):
        assert not grad[rows].any()


# ---- torch.compile ----


def test_other_lengths_and_windows_need_no_other_graph():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def attention(q, k, v, cu_seqlens, longest, window):
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, window_size=(window, 0))

    compiled = torch.compile(attention, backend=count, fullgraph=True)
    for step, tokens in enumerate((64, 65, 70, 81, 90, 100, 111, 120, 130, 140)):
        q, k, v = torch.randn(tokens, 4, 32), torch.randn(tokens, 2, 32), torch.randn(tokens, 2, 32)
        arguments = q, k, v, torch.tensor([0, tokens // 2, tokens], dtype=torch.int32), tokens - tokens // 2, 5 + step
        assert torch.equal(compiled(*arguments), attention(*arguments))
    assert len(graphs) <= 2


def test_other_grids_need_no_other_graph():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    ln_weight, ln_bias, w1, w2 = torch.ones(32), torch.zeros(32), torch.randn(16, 32), torch.randn(8, 16)

    def project(x, rows, columns):
        return pixel_shuffle_projection(x, ln_weight, ln_bias, w1, w2, grid=(rows, columns), class_token=False)

    compiled = torch.compile(project, backend=count, fullgraph=True)
    for rows, columns in ((2, 4), (4, 6), (6, 10), (4, 8), (8, 12), (2, 6), (10, 4), (4, 10), (12, 2)):
        x = torch.randn(2, rows * columns, 8)
        torch.testing.assert_close(compiled(x, rows, columns), project(x, rows, columns))
    assert len(graphs) <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_takes_other_numbers_of_documents(strict):
    """From views of one qkv tensor, as models pass them."""

    class Attention(torch.nn.Module):
        def forward(self, qkv, cu_seqlens):
            return varlen_attention(qkv[:, :4], qkv[:, 4:6], qkv[:, 6:], cu_seqlens)

    tokens, entries = torch.export.Dim("tokens", min=2, max=4096), torch.export.Dim("entries", min=2, max=512)
    given = torch.randn(12, 8, 32), torch.tensor([0, 5, 12], dtype=torch.int32)
    shapes = {"qkv": {0: tokens}, "cu_seqlens": {0: entries}}
    program = torch.export.export(Attention(), given, dynamic_shapes=shapes, strict=strict).module()
    other = torch.randn(30, 8, 32), torch.tensor([0, 3, 9, 20, 30], dtype=torch.int32)
    assert torch.equal(program(*other), Attention()(*other))


_RING = """
import torch
import torch.distributed as dist
from longvita_kernels import plan_context_parallel, ring_attention

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
plan = plan_context_parallel([0, 5, 12], 1)

def run(q, k, v):
    return plan.unshard(ring_attention(q * 2, k, v, plan)) * 3

found = []
for function in (run, torch.compile(run, backend="aot_eager")):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(12, heads, 32, generator=generator).requires_grad_() for heads in (2, 1, 1)]
    function(*inputs).sum().backward()
    found.append([x.grad for x in inputs])
assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))
"""


@pytest.mark.dist
def test_the_ring_breaks_a_graph_by_itself():
    done = subprocess.run([sys.executable, "-c", _RING], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- arguments ----


def attention_inputs():
    q, k = torch.randn(5, 2, 16), torch.randn(5, 1, 16)
    return q, k, torch.randn(5, 1, 16), torch.tensor([0, 2, 5], dtype=torch.int32)


def test_none_means_what_configurations_mean_by_it():
    inputs = attention_inputs()
    assert torch.equal(varlen_attention(*inputs, window_size=None, softcap=None), varlen_attention(*inputs))
    hidden, weight, labels = loss_inputs()
    labels[0] = -100
    options = dict.fromkeys(("ignore_index", "softcap", "z_loss", "label_smoothing"))
    assert torch.equal(linear_cross_entropy(hidden, weight, labels, **options), linear_cross_entropy(hidden, weight, labels))
    x, ones = torch.randn(1, 4, 4), torch.ones(16)
    projector = x, ones, ones, torch.randn(8, 16), torch.randn(3, 8)
    options = {"grid": (2, 2), "class_token": False}
    assert torch.equal(pixel_shuffle_projection(*projector, eps=None, **options), pixel_shuffle_projection(*projector, **options))
    plans = [plan_context_parallel([0, 9], 2, window_size=window) for window in (None, (-1, -1))]
    assert plans[0].fingerprint == plans[1].fingerprint


def test_offsets_may_be_int64():
    q, k, v, cu_seqlens = attention_inputs()
    assert torch.equal(varlen_attention(q, k, v, cu_seqlens.long()), varlen_attention(q, k, v, cu_seqlens))
    caches = [torch.zeros(2, 8, 1, 16) for _ in range(4)]
    lengths = torch.tensor([1, 0])
    append_kv(k, v, *caches[:2], cu_seqlens.long(), lengths)
    append_kv(k, v, *caches[2:], cu_seqlens, lengths.int())
    assert torch.equal(caches[0], caches[2]) and caches[0].any()
    total = lengths + cu_seqlens.long().diff()
    assert torch.equal(
        decode_attention(q, *caches[:2], cu_seqlens.long(), total), decode_attention(q, *caches[:2], cu_seqlens, total.int())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 4096}, r"window_size is 4096; expected \(left, right\).*is \(w - 1, 0\)"),
        ({"window_size": (3.0, 0)}, r"window_size is \(3.0, 0\); expected \(left, right\), two ints"),
        ({"softmax_scale": torch.nn.Parameter(torch.tensor(0.1))}, r"softmax_scale requires a gradient.*multiply q by it"),
        ({"softmax_scale": math.nan}, "softmax_scale is nan; expected a finite number"),
        ({"softcap": -1.0}, "softcap is -1.0; expected a finite number above 0, or 0 or None for none"),
    ],
)
def test_options_of_attention_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        varlen_attention(*attention_inputs(), **options)


def test_arguments_of_another_kind_are_named():
    q, k, v, _ = attention_inputs()
    remedy = r"cu_seqlens_q is a list; expected a tensor. Remedy: torch.tensor\(cu_seqlens_q, dtype=torch.int32"
    with pytest.raises(ValueError, match=remedy):
        varlen_attention(q, k, v, [0, 2, 5])
    hidden, weight, labels = loss_inputs()
    with pytest.raises(ValueError, match=r"rows is a list; expected a tensor. Remedy: torch.tensor\(rows, dtype=torch.int64\)"):
        masked_lm_head(hidden, weight, [0, 1])
    with pytest.raises(ValueError, match="ignore_index is -100.0; expected an int, or None for -100"):
        linear_cross_entropy(hidden, weight, labels, ignore_index=-100.0)
    x, ones = torch.randn(1, 4, 4), torch.ones(16)
    projector = x, ones, ones, torch.randn(8, 16), torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"grid is \(2.0, 2.0\); expected \(rows, cols\) of patches, two even ints above 0"):
        pixel_shuffle_projection(*projector, grid=(2.0, 2.0), class_token=False)
    for eps in (math.nan, -1e-5, math.inf):
        with pytest.raises(ValueError, match=f"eps is {eps}; expected a finite number of at least 0, or None"):
            pixel_shuffle_projection(*projector, grid=(2, 2), class_token=False, eps=eps)


def test_functional_derivatives_say_what_to_use_instead():
    hidden, weight, labels = loss_inputs()
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=r"does not work inside torch.func.grad.*Remedy: backward\(\) or torch.autograd.grad"):
            transform(lambda h: linear_cross_entropy(h, weight, labels))(hidden)
    q, k, v, cu_seqlens = attention_inputs()
    both = torch.func.vmap(lambda q: varlen_attention(q, k, v, cu_seqlens))(torch.stack([q, 2 * q]))
    assert torch.equal(both[1], varlen_attention(2 * q, k, v, cu_seqlens)), "vmap works, one call after the other"


def test_a_cache_that_cannot_be_written_is_refused():
    _, k, v, cu_seqlens = attention_inputs()
    lengths = torch.zeros(2, dtype=torch.int32)
    good = torch.zeros(2, 8, 1, 16)
    with pytest.raises(ValueError, match=r"v_cache is expanded: several of its elements are the same memory. Remedy: v_cache.contiguous"):
        append_kv(k, v, good, torch.zeros(1, 8, 1, 16).expand(2, -1, -1, -1), cu_seqlens, lengths)
    with pytest.raises(ValueError, match=r"k_cache requires a gradient, but it is written in place and takes none. Remedy: k_cache.detach"):
        append_kv(k, v, good.clone().requires_grad_(), good, cu_seqlens, lengths)
    assert not good.any(), "nothing was written"
