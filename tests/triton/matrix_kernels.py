"""The Triton kernels of the matrix ops under Triton's interpreter, on CPU tensors. Run by test_interpreted.py in a process of its own,
because a kernel is made for the interpreter or for a GPU when it is defined:

    TRITON_INTERPRET=1 python -m pytest tests/triton/matrix_kernels.py
"""

import pytest
import torch

from longvita_kernels import linear_cross_entropy, masked_lm_head, pixel_shuffle_projection, testing
from longvita_kernels.spec import SampleInput, all_specs
from longvita_kernels.triton import _matmul
from longvita_kernels.triton import linear_cross_entropy as cross_entropy_kernels
from longvita_kernels.triton import masked_lm_head as head_kernels
from tests.triton.support import DTYPES, check, on_triton  # noqa: F401  (a fixture)

OPS = ("linear_cross_entropy", "masked_lm_head", "pixel_shuffle_projection")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_forward_and_gradients_are_accurate(sample_seed, name, dtype):
    check(name, dtype, sample_seed, lambda sample: [{}])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_forward_alone_and_each_input_frozen_in_turn(sample_seed, name, dtype):
    def choices(sample):
        names = sample.differentiable
        return [{"wrt": ()}, *({"wrt": tuple(n for n in names if n != frozen)} for frozen in names)]

    check(name, dtype, sample_seed, choices)


# ------------------------------------------------------------------------------------------------------------------------- masked_lm_head


def test_repeated_rows_add_up_before_they_are_rounded():
    hidden = torch.ones(3, 8, dtype=torch.bfloat16).requires_grad_()
    weight = torch.full((5, 8), 1 / 256, dtype=torch.bfloat16)
    masked_lm_head(hidden, weight, torch.ones(400, dtype=torch.int64))[:, 0].sum().backward()
    assert hidden.grad[1].tolist() == [400 / 256] * 8 and not hidden.grad[[0, 2]].any()


def test_rows_out_of_range_are_clamped():
    """What a GPU does with values that nobody may look at: a wrong number, never an access out of bounds."""
    hidden, weight = torch.randn(6, 16), torch.randn(9, 16)
    wild, tame = torch.tensor([-3, 2, 1 << 40, 6]), torch.tensor([0, 2, 5, 5])
    testing.assert_bit_equal(head_kernels.forward(hidden, weight, wild), head_kernels.forward(hidden, weight, tame))
    grad = torch.randn(4, 9)
    for a, b in zip(*(head_kernels.backward(grad, hidden, weight, rows, [True, True]) for rows in (wild, tame)), strict=True):
        testing.assert_bit_equal(a, b)
    none = torch.randn(0, 16)
    assert not head_kernels.forward(none, weight, wild).any()
    assert not head_kernels.backward(grad, none, weight, wild, [True, True])[1].any()


# ---------------------------------------------------------------------------------------------------------------------- the matrix product


@pytest.mark.parametrize("a_dense", ["k", "m"])
@pytest.mark.parametrize("b_dense", ["k", "n"])
def test_whole_blocks_and_pointers_give_the_same_bits(a_dense, b_dense, monkeypatch):
    """Operands as tensor descriptors, of themselves or of their transposes; no size is a multiple of a block."""
    M, N, K = 72, 88, 104
    a = torch.randn(M, K).half() if a_dense == "k" else torch.randn(K, M).half().T
    b = torch.randn(K, N).half() if b_dense == "n" else torch.randn(N, K).half().T
    tile, found = _matmul.tile_for(torch.float16, 0), []
    for tma in (True, False):
        monkeypatch.setitem(_matmul._TILES["wide", 16], 0, tile._replace(tma=tma))
        out = torch.empty(M, N)
        _matmul.matmul(a, b, out)
        found.append(out)
    testing.assert_bit_equal(*found)
    torch.testing.assert_close(found[0], a.float() @ b.float(), rtol=1e-4, atol=1e-4)


def test_which_operands_come_as_whole_blocks():
    tile, a = _matmul.tile_for(torch.float16, 0), torch.randn(40, 48).half()
    *_, described = _matmul.operands(a, a[:, :24], tile)
    assert described == {"TMA_A": "k", "TMA_B": "k"}  # a width of 24 of rows 48 apart
    *_, described = _matmul.operands(a.T, a, tile)
    assert described == {"TMA_A": "r", "TMA_B": "k"}
    rows_off, base_off, thin = torch.randn(40, 44).half()[:, :24], a[:, 3:27], a[:, ::2]
    for wrong in (rows_off, base_off, thin, a[:0]):
        left, right, described = _matmul.operands(a, wrong, tile)
        assert left is a and right is wrong and described == {"TMA_A": "", "TMA_B": ""}
    assert not _matmul.tile_for(torch.float16, 80).tma and not _matmul.tile_for(torch.float16, 120).tma
    assert all(_matmul.tile_for(torch.bfloat16, capability).tma for capability in (90, 100, 103))


# ------------------------------------------------------------------------------------------------------------------- linear_cross_entropy


def _loss_inputs(tokens=300, width=24, vocab=200, supervised=0.6):
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab, width) / 3
    labels = torch.randint(vocab, (tokens,))
    labels[torch.rand(tokens) >= supervised] = -100
    return hidden, weight, labels


def test_rows_are_compacted_in_order():
    labels = torch.tensor([-100, 4, -100, 7, 7, -100])
    for tiled in (labels, labels.repeat(3000), labels[:1], labels[:0]):
        kept, count = cross_entropy_kernels._compact(tiled, -100)
        assert kept[: count.item()].tolist() == (tiled != -100).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunks_change_nothing_but_roundings(reduction, monkeypatch):
    """128 rows, or 256 columns, at a time instead of all."""
    hidden, weight, labels = _loss_inputs(vocab=600)
    found = []
    for workspace in (cross_entropy_kernels.WORKSPACE, 1):
        monkeypatch.setattr(cross_entropy_kernels, "WORKSPACE", workspace)
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, labels, reduction=reduction, softcap=6.0, z_loss=0.01, label_smoothing=0.1)
        (loss.sum() * 0.5).backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    assert cross_entropy_kernels._chunk_rows(600, 300, 4) == 128
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_zeros_behind_the_rows_of_a_chunk_suffice(monkeypatch):
    """A product over a number of rows that only the device knows takes whole steps: none may be deeper than the 64 rows that hold zeros."""
    tiles = {kind: table for kind, table in _matmul._TILES.items() if kind[0] != "thin"}
    assert all(64 % tile.k == 0 for table in tiles.values() for tile in table.values())
    monkeypatch.setitem(_matmul._TILES["thin", 32], 0, _matmul.Tile(64, 16, 128, 4, 1))  # as deep as on an H100
    hidden, weight, labels = _loss_inputs(tokens=70, width=16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    for options in ({}, {"low_memory": True}):
        with testing.poisoned_empty():
            linear_cross_entropy(hidden, weight, labels, **options).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_ignored_rows_are_never_read():
    hidden, weight, labels = _loss_inputs()
    hidden[labels == -100] = float("nan")
    for reduction in ("sum", "none"):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with testing.poisoned_empty():
            loss = linear_cross_entropy(leaf, head, labels, reduction=reduction)
            loss.sum().backward()
        assert loss.isfinite().all() and head.grad.isfinite().all()
        assert not leaf.grad[labels == -100].any() and leaf.grad[labels != -100].isfinite().all()


def test_labels_out_of_range_touch_nothing():
    """As nobody may look at labels on a GPU: such a row has no label, so its loss is its lse."""
    hidden, weight, labels = _loss_inputs(tokens=9, supervised=1.0)
    labels[3:5] = torch.tensor([1 << 40, -7])
    statistics = cross_entropy_kernels.rows_statistics(hidden, weight, labels, -100, 0.0, 0)
    logits = hidden @ weight.T
    torch.testing.assert_close(statistics[0], logits.logsumexp(1))
    inside = labels.clamp(0, 199)
    expected = logits.gather(1, inside[:, None]).squeeze(1) * (labels == inside)
    torch.testing.assert_close(statistics[1], expected)


def test_parts_of_a_vocabulary_join():
    hidden, weight, labels = _loss_inputs()
    whole = cross_entropy_kernels.rows_statistics(hidden, weight, labels, -100, 5.0, 0)
    left, right = (cross_entropy_kernels.rows_statistics(hidden, weight[part], labels, -100, 5.0, part.start)
                   for part in (slice(0, 70), slice(70, 200)))  # fmt: skip
    kept = labels != -100
    torch.testing.assert_close(torch.logaddexp(left[0], right[0])[kept], whole[0][kept])
    torch.testing.assert_close((left + right)[1:3], whole[1:3])
    torch.testing.assert_close(torch.maximum(left[3], right[3]), whole[3])


def test_runs_agree_in_every_bit():
    hidden, weight, labels = _loss_inputs(tokens=150)
    results = []
    for _ in range(2):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, labels, reduction="mean")
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        testing.assert_bit_equal(a, b)


# --------------------------------------------------------------------------------------------------------------- pixel_shuffle_projection


def _projector_inputs(tiles=3, grid=(4, 6), channels=8, hidden=40, out=24, dtype=torch.float32):
    width = 4 * channels
    x = torch.randn(tiles, grid[0] * grid[1] + 1, channels).to(dtype)
    ln_weight, ln_bias = (torch.rand(width) + 0.5).to(dtype), torch.randn(width).to(dtype)
    return x, ln_weight, ln_bias, (torch.randn(hidden, width) / 6).to(dtype), (torch.randn(out, hidden) / 4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_larger_than_the_deviation(dtype):
    """The path that subtracts the mean from the operand: some rows, then all. bfloat16 keeps 8 bits of x, so the deviation is 4 there."""
    spec = all_specs()["pixel_shuffle_projection"]
    x, *rest = _projector_inputs(dtype=dtype)
    for far in (slice(1, 2), slice(None)):
        moved = x.clone()
        moved[far] = moved[far] * 4 + 200
        kwargs = {"grid": (4, 6)}
        testing.check_sample(spec, SampleInput("far", (moved, *rest), kwargs, ("x", "ln_weight", "ln_bias", "w1", "w2")))


def test_a_far_row_changes_no_bit_of_its_neighbours():
    inputs = _projector_inputs(dtype=torch.float16)
    whole = pixel_shuffle_projection(*inputs, grid=(4, 6))
    changed = inputs[0].clone()
    changed[1] = changed[1] * 0.1 + 500
    others = pixel_shuffle_projection(changed, *inputs[1:], grid=(4, 6))
    testing.assert_bit_equal(others[[0, 2]], whole[[0, 2]])
    assert not torch.equal(others[1], whole[1])


def test_the_class_token_is_never_read():
    inputs = _projector_inputs()
    inputs[0][:, 0] = float("nan")
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = pixel_shuffle_projection(*leaves, grid=(4, 6))
    out.sum().backward()
    assert out.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves[1:])
    assert not leaves[0].grad[:, 0].any() and leaves[0].grad[:, 1:].isfinite().all()


@pytest.mark.parametrize("tower", ["fixed", "trained"])
def test_no_shuffled_copy_exists(tower):
    """What torch hands out beside the gradient of x grows by less than x does; for a fixed tower there is no such gradient."""

    def memory(tiles):
        inputs = _projector_inputs(tiles, (16, 16), 16, 4, 4)
        leaves = [tensor.requires_grad_(i > 0 or tower == "trained") for i, tensor in enumerate(inputs)]
        with testing.poisoned_empty() as shapes:
            pixel_shuffle_projection(*leaves, grid=(16, 16)).sum().backward()
        assert shapes.count(tuple(inputs[0].shape)) == (tower == "trained")
        return sum(torch.Size(shape).numel() for shape in shapes if tuple(shape) != tuple(inputs[0].shape)), inputs[0].numel()

    (few, small), (many, large) = memory(3), memory(9)
    assert many - few < 0.75 * (large - small), (few, many)
