"""What the ways inside torch (backend "torch") do beyond the accuracy of each sample (tests/ops/test_specs.py): chunks, values that nobody
may look at on a GPU, synchronisation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longvita_kernels import backends, decode_attention, linear_cross_entropy, masked_lm_head, testing
from longvita_kernels.ops import _cache, _common, _decode_path, _loss_path
from longvita_kernels.ops import append_kv as append_module
from longvita_kernels.ops import decode_attention as decode_module
from longvita_kernels.ops import linear_cross_entropy as loss_module
from longvita_kernels.ops import masked_lm_head as head_module
from longvita_kernels.ops import merge_attention as merge_module
from longvita_kernels.ops import pixel_shuffle_projection as projector_module


@pytest.fixture(autouse=True)
def _inside_torch():
    torch.manual_seed(3)
    with backends.use("torch"):
        yield


def _loss_inputs(tokens=60, width=24, vocab=200):
    labels = torch.randint(vocab, (tokens,))
    labels[torch.rand(tokens) < 0.4] = -100
    return torch.randn(tokens, width), torch.randn(vocab, width) / 3, labels


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"reduction": "none"}], ids=str)
def test_chunks_of_logits_change_nothing_but_roundings(options, monkeypatch):
    """A few rows, or columns, at a time."""
    hidden, weight, labels = _loss_inputs()
    found = []
    for size in (1 << 28, 7 * 200):
        monkeypatch.setattr(_loss_path, "_LOGITS", size)
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, labels, softcap=6.0, z_loss=0.01, label_smoothing=0.1, **options)
        (loss.sum() * 0.5).backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    assert len(_loss_path._chunks(36, 200)) == 6
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_logits_exist_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(_loss_path, "_LOGITS", 4 * 200)
    seen, whole = [], _loss_path.product

    def product(a, b):
        seen.append((a.shape[0], b.shape[1]))
        return whole(a, b)

    monkeypatch.setattr(_loss_path, "product", product)
    hidden, weight, labels = _loss_inputs()
    linear_cross_entropy(hidden.requires_grad_(), weight, labels).backward()
    rows = int((labels != -100).sum())
    logits = [size for size in seen if size[1] == 200]
    assert max(size[0] for size in logits) == 4 and sum(size[0] for size in logits) == rows  # ignored rows cost nothing


def test_ignored_rows_are_never_read():
    hidden, weight, labels = _loss_inputs()
    hidden[labels == -100] = float("nan")
    for options in ({}, {"reduction": "none"}, {"low_memory": True}):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(leaf, head, labels, **options)
        loss.sum().backward()
        assert loss.isfinite().all() and head.grad.isfinite().all()
        assert not leaf.grad[labels == -100].any() and leaf.grad[labels != -100].isfinite().all()


def test_parts_of_a_vocabulary_and_labels_of_others():
    """A label of another part, or of none at all: such a row's target is 0, and nothing is looked up out of bounds."""
    hidden, weight, labels = _loss_inputs()
    rows = torch.arange(len(labels))
    labels = labels.clamp(min=0)
    labels[3], labels[4] = 1 << 40, -7
    whole, *_ = _loss_path.visit(hidden, weight, rows, labels, 5.0)
    parts = [_loss_path.visit(hidden, weight[a:b], rows, labels - a, 5.0)[0] for a, b in ((0, 70), (70, 200))]
    torch.testing.assert_close(torch.logaddexp(parts[0][0], parts[1][0]), whole[0])
    torch.testing.assert_close((parts[0] + parts[1])[1:3], whole[1:3], rtol=1e-5, atol=1e-4)
    assert whole[1, 3] == whole[1, 4] == 0 and whole[1, :3].all()


def test_the_gradient_of_weight_is_added_up_in_float32(monkeypatch):
    """1,000 equal rows, one at a time: in bfloat16 a sum of equal numbers stops growing at 256 of them."""
    monkeypatch.setattr(_loss_path, "_LOGITS", 1)
    hidden = torch.full((1000, 8), 0.5, dtype=torch.bfloat16)
    weight = torch.zeros(2, 8, dtype=torch.bfloat16).requires_grad_()
    linear_cross_entropy(hidden, weight, torch.zeros(1000, dtype=torch.int64)).backward()
    assert weight.grad.tolist() == [[-250.0] * 8, [250.0] * 8]


def test_rows_out_of_range_are_clamped():
    hidden, weight, grad = torch.randn(6, 16), torch.randn(9, 16), torch.randn(4, 9)
    both = torch.tensor([-3, 2, 1 << 40, 6]), torch.tensor([0, 2, 5, 5])
    testing.assert_bit_equal(*(head_module._torch_forward(hidden, weight, rows) for rows in both))
    for a, b in zip(*(head_module._torch_backward(grad, hidden, weight, rows, [True, True]) for rows in both), strict=True):
        testing.assert_bit_equal(a, b)


def test_repeated_rows_add_up_before_they_are_rounded():
    hidden = torch.ones(3, 8, dtype=torch.bfloat16).requires_grad_()
    weight = torch.full((5, 8), 1 / 256, dtype=torch.bfloat16)
    masked_lm_head(hidden, weight, torch.ones(400, dtype=torch.int64))[:, 0].sum().backward()
    assert hidden.grad[1].tolist() == [400 / 256] * 8 and not hidden.grad[[0, 2]].any()


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("table", [None, _int32(0, 2, 99, -1).view(2, 2)], ids=["rows", "paged"])
def test_wild_lengths_touch_nothing_outside(table):
    shape = (2, 4, 1, 16) if table is None else (3, 4, 1, 16)
    memory = torch.zeros(10, 4, 1, 16)
    cache, x = memory[3 : 3 + shape[0]], torch.ones(5, 1, 16)
    for cu in (_int32(0, 2, 5), _int32(0, 10**9, 5), _int32(4, -7, 3)):
        for lengths in (_int32(-5, 10**9), _int32(3, 9)):
            append_module.write_reference(x, x, cache, cache, cu, lengths, table)
    assert cache.any() and not memory[:3].any() and not memory[3 + shape[0] :].any()


@pytest.mark.parametrize("options", [{}, {"window_size": (9, 0)}, {"causal": False, "window_size": (5, 3), "softcap": 4.0}], ids=str)
def test_a_cache_in_steps_of_a_few_keys(options, monkeypatch):
    """Sequences of 0 to 11 queries, more than there are keys among them: every way to cut them into tiles, and keys into steps."""
    counts, lengths = (1, 0, 11, 2, 5, 3), (40, 7, 29, 1, 0, 77)
    q, k, v = torch.randn(sum(counts), 4, 16), torch.randn(6, 80, 2, 16), torch.randn(6, 80, 2, 16)
    cu = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    arguments, found = (q, k, v, cu, _int32(*lengths)), []
    with backends.use("reference"):
        want = decode_attention(*arguments, return_lse=True, **options)
    for step, fewest in ((1 << 26, 64), (1, 1), (1, 7)):
        monkeypatch.setattr(_decode_path, "_STEP", (step, step))
        monkeypatch.setattr(_decode_path, "_FEWEST", fewest)
        found.append(decode_attention(*arguments, return_lse=True, **options))
    for got in found:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_step_of_keys_takes_the_memory_that_is_said(monkeypatch):
    """The keys that are read at a time are a fraction of _STEP, and places behind the longest sequence cost nothing."""
    monkeypatch.setattr(_decode_path, "_STEP", (1 << 16, 1 << 16))
    q, cache = torch.randn(4, 8, 32), torch.full((4, 2000, 2, 32), float("nan"))
    cache[:, :500] = torch.randn(4, 500, 2, 32)
    sizes, take = [], _cache.take
    monkeypatch.setattr(_cache, "take", lambda *arguments: (sizes.append((out := take(*arguments)).numel()), out)[1])
    assert decode_attention(q, cache, cache, _int32(*range(5)), _int32(500, 3, 0, 499)).isfinite().all()
    assert max(sizes) <= (1 << 16) // 4 and sum(sizes) == 2 * 4 * 500 * 2 * 32


@pytest.mark.parametrize("table", [None, _int32(0, 2, 99, -1).view(2, 2)], ids=["rows", "paged"])
def test_wild_lengths_read_nothing_outside(table, monkeypatch):
    """What is read lies in the cache, which is all ones: so is every row that sees anything."""
    monkeypatch.setattr(_common, "checks_values", lambda tensor: False)
    memory = torch.full((10, 4, 1, 16), float("nan"))
    cache = memory[3 : 5 if table is None else 6].fill_(1.0)
    for cu in (_int32(0, 2, 5), _int32(0, 10**9, 5), _int32(4, -7, 3), _int32(2**31 - 1, -(2**31), 2**31 - 1)):
        for lengths in (_int32(-5, 10**9), _int32(3, 9), _int32(-(2**31), 2**31 - 1)):
            for window in ((-1, -1), (2, 0), (1 << 40, 0)):
                out, lse = decode_attention(
                    torch.randn(5, 2, 16), cache, cache, cu, lengths, block_table=table, window_size=window, return_lse=True
                )
                assert (((out - 1).abs() < 1e-6) | (out == 0)).all() and not lse.isnan().any()


def _implementations():
    """Of each op that promises not to synchronise: what runs below its dispatcher."""
    cu, lengths = _int32(0, 3, 5), _int32(1, 0)
    k, cache = torch.randn(5, 2, 16), torch.zeros(2, 8, 2, 16)
    yield "append_kv", lambda: append_module._append_impl(k, k, cache, cache.clone(), cu, lengths, None, None, None)
    codes, scale, table = cache.to(torch.int8), torch.ones(2, 8, 2), _int32(0, 0, 1, 1).view(2, 2)
    q, found = torch.randn(5, 4, 16), (cu, lengths + cu.diff())
    yield "decode_attention", lambda: decode_module._decode_impl(q, cache, cache, *found, None, None, None, True, -1, -1, 0.0, 0.2)
    yield "decode_attention, paged int8", lambda: decode_module._decode_impl(
        q, codes, codes, *found, table, scale, scale, False, 3, 1, 2.0, 0.2
    )
    out, lse = torch.randn(7, 2, 16), torch.randn(2, 7)
    yield "merge_attention", lambda: merge_module._forward_impl(out, lse, out, lse)
    yield "merge_attention_backward", lambda: merge_module._backward_impl(out, lse, out, lse, out, lse, [True] * 4)
    hidden, weight, rows, needs = torch.randn(9, 16), torch.randn(11, 16), torch.tensor([4, 4, 0]), [True, True]
    yield "masked_lm_head", lambda: head_module._forward_impl(hidden, weight, rows)
    yield "masked_lm_head_backward", lambda: head_module._backward_impl(torch.ones(3, 11), hidden, weight, rows, needs)
    x, ln, w1, w2 = torch.randn(2, 17, 4), torch.ones(16), torch.randn(6, 16), torch.randn(5, 6)
    inputs, options, z = (x, ln, ln, w1, None, w2, None), ([4, 4], True, 1e-5), torch.randn(8, 6)
    yield "pixel_shuffle_projection", lambda: projector_module._forward_impl(*inputs, *options, True)
    grads = [True, True, True, True, False, True, False]
    grad, stats = torch.randn(2, 4, 5), torch.zeros(2, 8)
    yield "pixel_shuffle_projection_backward", lambda: projector_module._backward_impl(grad, *inputs, z, stats, *options, grads)


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name())
        return function(*args, **(kwargs or {}))


_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::repeat_interleave.Tensor", "aten::_unique2"}


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in _implementations()])
def test_nothing_is_read_back(call, monkeypatch):
    """What would make a GPU wait: numbers for Python, and shapes that depend on values. The checks of values, a CPU's alone, are off."""
    monkeypatch.setattr(_common, "checks_values", lambda tensor: False)
    with _Watch() as watch:
        call()
    assert len(watch.seen) > 3 and not _WAITS & watch.seen


def test_what_is_read_back_is_seen():
    labels = torch.tensor([-100, 4])
    with _Watch() as watch:
        loss_module._rows_impl(torch.randn(2, 8), torch.randn(5, 8), labels, -100, 0.0, 0, 5)
    assert "aten::nonzero" in watch.seen  # the number of supervised rows, as the module says
