"""The CUDA C++ kernels on the CPU, from the public op down to the device code. Run by test_cuda.py in a process of its own:
LONGVITA_CUDA_EMULATED=<library> python -m pytest tests/cuda/cuda_kernels.py
"""

import itertools

import pytest
import torch

from longvita_kernels import backends, masked_lm_head, merge_attention, testing, varlen_attention
from longvita_kernels.cuda import native_cuda
from longvita_kernels.cuda import varlen_attention as attention
from longvita_kernels.ops.varlen_attention import SPEC
from longvita_kernels.spec import SampleInput, all_specs

assert native_cuda.emulated(), f"set LONGVITA_CUDA_EMULATED before pytest starts ({native_cuda.why_missing()})"

OPS, DTYPES = ("masked_lm_head", "merge_attention"), (torch.float32, torch.bfloat16, torch.float16)
kernels = native_cuda.load()


@pytest.fixture(autouse=True)
def _on_cuda():
    torch.set_num_threads(1)
    with backends.use("cuda"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_accurate_with_each_input_frozen_and_each_output_unused(sample_seed, name, dtype):
    spec = all_specs()[name]
    pools = testing.pools(spec, dtype, "cpu", sample_seed)
    assert all(backends.choose(name, draws[0].args[0]) == "cuda" for draws in pools)

    def choices(sample):
        names = sample.differentiable
        yield from ({}, {"wrt": ()})
        yield from ({"wrt": tuple(n for n in names if n != frozen)} for frozen in names)
        yield from ({"used": (output,)} for output in spec.outputs)

    testing.check_samples(spec, pools, choices)


# ------------------------------------------------------------------------------------------------------------------------ masked_lm_head


def _logits(hidden, weight, rows):
    """hidden[rows] · weightᵀ, fp32 sums in torch's order."""
    return hidden.float()[rows] @ weight.float().T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "vocab"), [(8, 1), (64, 16), (264, 517), (1037, 40)], ids=str)
def test_logits_of_one_to_eight_rows(width, vocab, dtype):
    """Widths that end inside 16 bytes, a step and a group of steps; vocabularies that end inside a tile and need a second turn."""
    hidden, weight = (torch.randn(n, width).to(dtype) for n in (11, vocab))
    rows = torch.tensor([3, 0, 10, 3, 7, 5, 1, 9])
    one_by_one = torch.cat([masked_lm_head(hidden, weight, rows[i : i + 1]) for i in range(8)])
    for count in (1, 2, 5, 8):
        got, tolerance = masked_lm_head(hidden, weight, rows[:count]), 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got.float(), _logits(hidden, weight, rows[:count]), rtol=tolerance, atol=1e-3)
        testing.assert_bit_equal(got, one_by_one[:count])  # neighbours in the batch change no bit


def test_a_view_and_its_aligned_copy_give_the_same_bits():
    for dtype in DTYPES:
        hidden, weight = torch.randn(4, 301).to(dtype)[:, 1:], torch.randn(50, 301).to(dtype)[:, 1:]
        rows = torch.tensor([2, 0, 3])
        testing.assert_bit_equal(masked_lm_head(hidden, weight, rows), masked_lm_head(hidden.contiguous(), weight.contiguous(), rows))


def test_a_row_without_end_stays_alone():
    hidden, weight = torch.randn(5, 48).bfloat16(), torch.randn(33, 48).bfloat16()
    expected = masked_lm_head(hidden, weight, torch.tensor([0, 4]))
    hidden[1:4], weight[20] = float("inf"), float("nan")
    got = masked_lm_head(hidden, weight, torch.tensor([0, 4]))
    assert got[:, 20].isnan().all()
    kept = [v for v in range(33) if v != 20]
    testing.assert_bit_equal(got[:, kept].contiguous(), expected[:, kept].contiguous())


def test_rows_out_of_range_are_clamped_by_the_kernel():
    hidden, weight = torch.randn(5, 40), torch.randn(19, 40)
    rows, out = torch.tensor([-(2**40), 2**40]), torch.empty(2, 19)
    kernels.masked_lm_head_few_rows(
        0, 5, 40, 19, 2, hidden.data_ptr(), 40, weight.data_ptr(), 40, rows.data_ptr(), out.data_ptr(), 0
    )  # fmt: skip
    torch.testing.assert_close(out, _logits(hidden, weight, [0, 4]), rtol=1e-5, atol=1e-5)


def test_plan_of_few_rows():
    """(rows a pass, bytes of a row in shared memory, blocks) on an H200: 227 KiB, 132 multiprocessors."""
    plan = kernels.masked_lm_head_plan
    h200 = (227 << 10, 132)
    assert plan(1, 1, 5120, 152064, *h200) == (1, 10304, 264)
    assert plan(1, 8, 5120, 152064, *h200)[0] == 8 and plan(0, 8, 5120, 152064, *h200)[0] == 8
    assert plan(0, 8, 8192, 152064, *h200)[0] == 7  # 32 KiB a row: a second pass
    assert plan(1, 8, 200_000, 100, *h200)[0] == 0
    assert plan(1, 1, 64, 100, *h200)[2] == 1  # seven tiles of 16, eight warps
    for dtype, size in ((0, 4), (1, 2), (2, 2)):
        for width in (1, 37, 256, 5120):
            row = plan(dtype, 8, width, 1000, *h200)[1]
            assert row >= width * size and row % 128 == 64


def test_more_rows_than_fit_take_several_passes():
    hidden, weight = torch.randn(9, 20_000), torch.randn(3, 20_000)  # 78 KiB a row: two a pass
    rows = torch.arange(5)
    assert kernels.masked_lm_head_plan(0, 5, 20_000, 3, 227 << 10, 2)[0] == 2
    torch.testing.assert_close(masked_lm_head(hidden, weight, rows), _logits(hidden, weight, rows), rtol=1e-4, atol=1e-3)


def test_a_row_that_does_not_fit_is_refused():
    x, rows = torch.zeros(1, 60_000), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="a row of hidden has 60000 elements, more than fit into shared memory"):
        kernels.masked_lm_head_few_rows(0, 1, 60_000, 1, 1, x.data_ptr(), 0, x.data_ptr(), 0, rows.data_ptr(), rows.data_ptr(), 0)


def test_a_width_beyond_shared_memory_runs_elsewhere():
    hidden, weight = torch.randn(2, 60_000), torch.randn(3, 60_000)
    with pytest.raises(RuntimeError, match="cannot run masked_lm_head: the CUDA kernel keeps a row of hidden in shared memory"):
        masked_lm_head(hidden, weight, torch.tensor([1]))
    backends.use("auto")
    assert backends.explain("masked_lm_head", hidden, weight, torch.tensor([1])).startswith("masked_lm_head: native")


# ----------------------------------------------------------------------------------------------------------------------- merge_attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_wide_and_one_by_one_gives_the_same_bits(dtype):
    """Heads of 80 elements, dense, and as a view in which no row begins at a multiple of 16 bytes."""
    outs = [torch.randn(21, 3, 80).to(dtype) for _ in "ab"]
    lses = [3 * torch.randn(3, 21) for _ in "ab"]
    dense = merge_attention(outs[0], lses[0], outs[1], lses[1])
    views = [torch.cat((out[..., :1], out), -1)[..., 1:] for out in outs]
    assert all(view.stride(1) == 81 for view in views)
    for a, b in zip(merge_attention(views[0], lses[0], views[1], lses[1]), dense, strict=True):
        testing.assert_bit_equal(a, b)


def test_merging_parts_that_saw_nothing_and_distant_ones():
    out = torch.stack([torch.full((2, 8), float(n)) for n in range(4)])
    lse_a = torch.tensor([[-torch.inf, -torch.inf, 0.0, 200.0]] * 2)
    lse_b = torch.tensor([[-torch.inf, 1.0, -torch.inf, -200.0]] * 2)
    merged, lse = merge_attention(out, lse_a, -out, lse_b)
    assert merged[:, 0, 0].tolist() == [0.0, -1.0, 2.0, 3.0]
    assert lse[1].tolist() == [-torch.inf, 1.0, 0.0, 200.0]


# ---------------------------------------------------------------------------------------------------------------------- varlen_attention
# The kernels themselves are held to much more by the tests of their emulator: this is the way to them.


def _offsets(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _attention_sample(label, lengths_q, lengths_k=None, *, heads=(2, 1), dim=64, dtype=torch.bfloat16, strided=False, **options):
    sizes = [(sum(lengths_q), heads[0]), *[(sum(lengths_k or lengths_q), heads[1])] * 2]
    if strided:
        q, k, v = torch.randn(sizes[0][0], heads[0] + 2 * heads[1], dim).to(dtype).split([heads[0], heads[1], heads[1]], dim=1)
    else:
        q, k, v = (torch.randn(*size, dim).to(dtype) for size in sizes)
    offsets = [_offsets(*lengths) for lengths in (lengths_q, lengths_k) if lengths]
    return SampleInput(label, (q, k, v, *offsets), {"return_lse": True, **options}, ("q", "k", "v"))


def test_attention_is_accurate():
    for sample in (
        _attention_sample("packed, empty and single documents", (17, 0, 1, 41, 5)),
        _attention_sample("strided, D 128, fp16", (70, 30), dim=128, dtype=torch.float16, heads=(2, 2), strided=True),
        _attention_sample("Tq differs from Tk, window", (3, 20, 7, 0), (11, 9, 0, 4), causal=False, window_size=(6, 3), softmax_scale=0.2),
        _attention_sample("no tokens", (0,)),
    ):
        testing.check_sample(SPEC, sample)


def test_attention_with_each_input_frozen_and_each_output_unused():
    sample = _attention_sample("two documents", (9, 30))
    for choice in ({"wrt": ()}, {"wrt": ("q",)}, {"wrt": ("k", "v")}, {"wrt": ("v",)}, {"used": ("out",)}, {"used": ("lse",)}):
        testing.check_sample(SPEC, sample, **choice)


@pytest.mark.parametrize("limit", (0, attention.SINGLE_PASS_BYTES))
def test_the_backward_takes_a_single_pass_where_its_sums_fit(limit, monkeypatch):
    passes, call = [], native_cuda.call

    def recording(name, *arguments):
        if name == "varlen_attention_backward":
            passes.append(arguments[-3])
        call(name, *arguments)

    monkeypatch.setattr(native_cuda, "call", recording)
    monkeypatch.setattr(attention, "SINGLE_PASS_BYTES", limit)
    testing.check_sample(SPEC, _attention_sample("two documents", (9, 30)))
    testing.check_sample(SPEC, _attention_sample("two documents", (9, 30)), wrt=("q",))
    assert passes == [limit > 0, False]


def test_parts_in_float32_and_gradients_on_top_of_given_ones():
    """What ring attention does: two parts of the keys, merged; gradients of each part from the whole out and lse."""
    q, k, v = _attention_sample("", (40,), (60,)).args[:3]
    documents, scale, grad = _offsets(40), 0.2, torch.randn(40, 2, 64).bfloat16()
    parts = []
    for piece in (slice(0, 25), slice(25, 60)):
        cu = _offsets(piece.stop - piece.start)
        wide = torch.empty(40, 2, 64)
        parts.append((piece, cu, *attention.forward(q, k[piece], v[piece], documents, cu, scale, -1, -1, 0.0, out=wide)))
    out, lse = merge_attention(*(x for _, _, part, part_lse, _ in parts for x in (part, part_lse)))
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    with backends.use("reference"):
        options = {"causal": False, "softmax_scale": scale, "return_lse": True}
        want, want_lse = varlen_attention(*leaves, documents, _offsets(60), **options)
        want_grads = torch.autograd.grad(want, leaves, grad.float())
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for piece, cu, *_ in parts:
        attention.backward(
            grad, None, q, k[piece], v[piece], out.bfloat16(), lse, torch.zeros_like(lse), documents, cu, scale, -1, -1, 0.0,
            dq, dk[piece], dv[piece], add=True,
        )  # fmt: skip
    for got, expected in zip((dq, dk, dv), want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 80}, "the head dimension must be 64 or 128"),
        ({"dtype": torch.float32}, "q, k and v must be bfloat16 or float16"),
        ({"softcap": 2.0}, "there is no softcap"),
    ],
    ids=str,
)
def test_attention_that_the_kernels_do_not_take_says_why(options, words):
    sample = _attention_sample("", (5,), **options)
    with pytest.raises(RuntimeError, match=f"'cuda' was requested but cannot run varlen_attention: {words}"):
        varlen_attention(*sample.args, **sample.kwargs)
    with pytest.raises(RuntimeError, match=words):
        backends.explain("varlen_attention", *sample.args, **sample.kwargs)


def test_a_view_that_the_copy_engine_cannot_follow_is_named():
    q, k, v = (torch.zeros(5, 1, 65).bfloat16()[..., 1:] for _ in "qkv")
    with pytest.raises(RuntimeError, match="q does not begin at a multiple of 16 bytes|q's tokens are not multiples of 16 bytes apart"):
        varlen_attention(q, k, v, _offsets(5))


# ---------------------------------------------------------------------------------------------------------------------------- bindings


def test_bindings_refuse_what_does_not_fit():
    x, index = torch.zeros(64), torch.zeros(4, dtype=torch.int64)
    at, rows = x.data_ptr(), index.data_ptr()
    for wrong, words in (
        ((3, 2, 8, 4, 1, at, 8, at, 8, rows, at, 0), "dtype must be float32, bfloat16 or float16"),
        ((0, -1, 8, 4, 1, at, 8, at, 8, rows, at, 0), "sizes must not be negative"),
        ((0, 2, 8, 4, 1, at, -8, at, 8, rows, at, 0), "strides must not be negative"),
        ((0, 2, 8, 4, 1, at + 2, 8, at, 8, rows, at, 0), "not aligned"),
        ((0, 2, 8, 4, 1, at, 8, 0, 8, rows, at, 0), "weight: null pointer"),
        ((0, 2, 8, 4, 1, at, 8, at, 8, rows + 4, at, 0), "rows: pointer not aligned"),
        ((0, 0, 8, 4, 1, at, 8, at, 8, rows, at, 0), "hidden has no rows"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.masked_lm_head_few_rows(*wrong)
    size, rows3, lse = (2, 1, 8), (at, (8, 8)), (at, (2, 1))
    with pytest.raises(ValueError, match="lse is null"):
        kernels.merge_attention_forward(0, size, *rows3, 0, (2, 1), *rows3, *lse, at, at, 0)
    with pytest.raises(ValueError, match="output is null"):
        kernels.merge_attention_forward(0, size, *rows3, *lse, *rows3, *lse, at, 0, 0)
    with pytest.raises(ValueError, match="out_b: strides must not be negative"):
        kernels.merge_attention_forward(0, size, *rows3, *lse, at, (-8, 8), *lse, at, at, 0)


def test_memory_of_another_process_is_named_when_it_cannot_be_had():
    handle, offset = kernels.memory_export(torch.zeros(8).data_ptr())
    assert len(handle) == 64 and offset >= 0
    with pytest.raises(RuntimeError, match=r"opening memory of another process failed: invalid argument \(cudaErrorInvalidValue\)"):
        kernels.memory_open(handle)  # its own
    with pytest.raises(ValueError, match="memory_open: a handle has 64 bytes, got 3"):
        kernels.memory_open(b"abc")
    with pytest.raises(RuntimeError, match="opening an event of another process failed"):
        kernels.event_open(kernels.event_export(kernels.event_create()))
    with pytest.raises(ValueError, match="null pointer"):
        kernels.memory_copy(0, 8, 4, 0)
    source, target = torch.arange(5.0), torch.zeros(5)
    kernels.memory_copy(target.data_ptr(), source.data_ptr(), 16, 0)
    assert target.tolist() == [0, 1, 2, 3, 0]
