"""The Triton kernels of attention and its cache under Triton's interpreter, on CPU tensors. Run by test_interpreted.py in a process
of its own, because a kernel is made for the interpreter or for a GPU when it is defined:
TRITON_INTERPRET=1 python -m pytest tests/triton/attention_kernels.py
"""

import itertools

import pytest
import torch

from longvita_kernels import append_kv, backends, decode_attention, merge_attention, testing, varlen_attention
from longvita_kernels.ops import _cache
from longvita_kernels.ops.varlen_attention import SPEC
from longvita_kernels.ring import partial
from longvita_kernels.ring.programs import Call
from longvita_kernels.spec import SampleInput, all_specs
from longvita_kernels.triton import _launch
from longvita_kernels.triton import varlen_attention as kernels
from tests.triton.support import DTYPES, check, on_triton  # noqa: F401  (a fixture)

OPS = ("append_kv", "decode_attention", "merge_attention", "varlen_attention")


def _offsets(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_forward_and_gradients_are_accurate(sample_seed, name, dtype):
    check(name, dtype, sample_seed, lambda sample: [{}])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("merge_attention", "varlen_attention"))
def test_frozen_inputs_and_unused_outputs(sample_seed, name, dtype):
    def choices(sample):
        names = sample.differentiable
        yield {"wrt": ()}
        yield from ({"wrt": tuple(n for n in names if n != frozen)} for frozen in names)
        yield from ({"used": (output,)} for output in all_specs()[name].outputs)

    check(name, dtype, sample_seed, choices)


# ------------------------------------------------------------------------------------------------------------------------------- varlen


def _qkv(queries, keys, heads=(2, 1), dim=32, dtype=torch.float32):
    return [torch.randn(tokens, h, dim).to(dtype) for tokens, h in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))]


@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (32, 32)])
def test_tiles_windows_and_alignments(tile, monkeypatch):
    """Every way in which a window, a document's end and the diagonal can cut a tile."""
    monkeypatch.setattr(_launch, "INTERPRETER_BLOCKS", _launch.Blocks(*tile, 4, 1, 1))
    generator = torch.Generator().manual_seed(tile[0])
    for _ in range(3):
        lengths = torch.randint(0, 75, (2, 3), generator=generator).tolist()
        left, right = torch.randint(-1, 40, (2,), generator=generator).tolist()
        causal = bool(torch.rand((), generator=generator) < 0.5)
        q, k, v = _qkv(sum(lengths[0]), sum(lengths[1]))
        options = {"causal": causal, "window_size": (left, right), "return_lse": True}
        sample = SampleInput(f"{lengths} {options}", (q, k, v, *(_offsets(*side) for side in lengths)), options, ("q", "k", "v"))
        testing.check_sample(SPEC, sample)


def test_order_of_tiles_and_number_of_programs_change_no_bit(monkeypatch):
    q, k, v = _qkv(90, 90, dtype=torch.float16)
    arguments, found = (_offsets(50, 3, 37), _offsets(50, 3, 37), 0.2, -1, 0, 0.0), []
    for programs in (1, 3, 100):
        monkeypatch.setattr(_launch, "_multiprocessors", lambda device, count=programs: count)
        monkeypatch.setattr(torch, "argsort", lambda cost, descending: torch.randperm(len(cost)))
        out, lse, rest = kernels.forward(q, k, v, *arguments)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        kernels.backward(torch.ones_like(out), None, q, k, v, out, lse, rest, *arguments, *grads)
        found.append([out, lse, *grads])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            testing.assert_bit_equal(a, b)


def test_longest_tiles_come_first():
    schedule = kernels._Schedule(_offsets(10, 70, 0, 40), _offsets(10, 70, 0, 40), 120, 120, 32, -1, 0, 1, 1)
    # slots: the document of 10 (slot 0), of 70 (1, 2, 3), of 0 (4), of 40 (5, 6); the last two are of no tile
    assert schedule.order.tolist()[:4] == [3, 2, 6, 1] and len(schedule.order) == 120 // 32 + 4


def test_another_document_changes_no_bit():
    q, k, v = _qkv(80, 80, dtype=torch.float16)
    offsets, found = _offsets(33, 47), []
    for value in (None, 3.0):
        if value:
            q[33:], k[33:], v[33:] = value, value, float("nan")
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*leaves, offsets)
        out[:33].sum().backward()
        found.append([out[:33].detach(), *(leaf.grad[:33] for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        testing.assert_bit_equal(a, b)


def test_wide_partial_results_and_gradients_on_top_of_given_ones():
    """What ring attention does: two parts of the keys, each in float32, merged; gradients of each part from the whole lse."""
    q, k, v = _qkv(40, 60, dtype=torch.float16)
    documents, scale = _offsets(40), 0.2
    parts = [(slice(0, 20), _offsets(20), -1), (slice(20, 60), _offsets(40), 0)]  # the later part is on the diagonal
    parts_found = [
        kernels.forward(q, k[at], v[at], documents, cu_k, scale, -1, right, 0.0, out=torch.empty(q.shape)) for at, cu_k, right in parts
    ]
    assert parts_found[0][0].dtype == torch.float32
    out, lse = merge_attention(*parts_found[0][:2], *parts_found[1][:2])
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = SPEC.reference(*leaves, documents, _offsets(60), softmax_scale=scale)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-3, atol=1e-4)
    grad = torch.randn_like(out)
    dq, dk, dv = (torch.full(x.shape, 1.0) for x in (q, k, v))
    for at, cu_k, right in parts:
        rest = torch.zeros_like(lse)
        kernels.backward(grad, None, q, k[at], v[at], out, lse, rest, documents, cu_k, scale, -1, right, 0.0, dq, dk[at], dv[at], add=True)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for got, want in zip((dq, dk, dv), wanted, strict=True):
        torch.testing.assert_close(got.double() - 1, want, rtol=3e-3, atol=3e-3)


def _inside(shape, margin=4096, dtype=torch.float32):
    """A tensor of random numbers between two margins of NaN, and the margins."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 2 * margin,), float("nan"), dtype=dtype)
    tensor = memory[margin : margin + size].view(shape)
    tensor.copy_(torch.randn(shape))
    return tensor, (memory[:margin], memory[-margin:])


@pytest.mark.parametrize("wild", [(0, 10**9, -5, 7), (-(10**9), 3, 2, 2**31 - 1), (30, 20, 10, 0), (5, 5, 5, 5)])
def test_wild_offsets_touch_nothing_outside(wild):
    """On a GPU nobody looks at their values: numbers may be wrong, addresses not."""
    shapes = [(20, 2, 16)] + [(20, 1, 16)] * 2
    (q, k, v), _ = zip(*(_inside(shape) for shape in shapes), strict=True)
    (out, out_margins), *grads = (_inside(shape) for shape in (shapes[0], *shapes))
    out.zero_()
    cu, tame = torch.tensor(wild, dtype=torch.int32), _offsets(7, 0, 13)
    for cu_q, cu_k in ((cu, tame), (tame, cu), (cu, cu)):
        _, lse, rest = kernels.forward(q, k, v, cu_q, cu_k, 0.3, -1, 0, 0.0, out=out)
        known = lse.isfinite()  # rows of no document are left as they were
        lse, rest = torch.where(known, lse, -torch.inf), torch.where(known, rest, 0.0)
        kernels.backward(torch.ones_like(out), None, q, k, v, out, lse, rest, cu_q, cu_k, 0.3, -1, 0, 0.0, *(g for g, _ in grads))
        for tensor, margins in ((out, out_margins), *grads):
            assert tensor.isfinite().all() and all(margin.isnan().all() for margin in margins)


def test_offsets_beyond_32_bits():
    """Memory that is never touched costs nothing: 700 tokens that lie 2²² elements apart, and two that lie further."""
    tokens, stride, dim = 700, 1 << 22, 16
    memory = torch.empty(tokens * stride, dtype=torch.float16)
    far = memory.as_strided((tokens, 1, dim), (stride, dim, 1))
    far.copy_(torch.randn(tokens, 1, dim))
    assert (tokens - 1) * stride > 2**31
    for x, offsets in ((far, _offsets(650, 50)), (memory.as_strided((2, 1, dim), (600 * stride, dim, 1)), _offsets(2))):
        near = x.contiguous()
        for a, b in zip(*(_with_gradients(y, offsets) for y in (x, near)), strict=True):
            testing.assert_bit_equal(a, b)


def _with_gradients(x, offsets):
    """out and the gradients of an attention whose queries are the last 50 rows of documents (the interpreter is slow)."""
    offsets_q = torch.stack((torch.zeros_like(offsets[0]), offsets[-1].clamp(max=50)))
    q, last = x[-50:], offsets[-2:]
    k = x[int(last[0]) :]
    arguments = (offsets_q, (last - last[0]).int(), 0.25, -1, 0, 0.0)
    out, lse, rest = kernels.forward(q, k, k, *arguments)
    grads = [torch.empty(y.shape, dtype=y.dtype) for y in (q, k, k)]
    kernels.backward(torch.ones_like(out), None, q, k, k, out, lse, rest, *arguments, *grads)
    return out, lse, *grads


@pytest.mark.parametrize("ranges", [[(10, 60)], [(10, 40), (45, 65)]], ids=["one stretch", "two stretches"])
def test_a_step_of_the_ring_adds_to_what_is_there(ranges):
    """In float32, on top of views of the sums, with the lse of more keys than the step has."""
    q, k, v = _qkv(40, 50, dtype=torch.float16)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32).numpy() for x in ([0, 15, 40], [0, 20, 50]))
    call = Call([(0, 40)], ranges, cu_q, cu_k, -1, 0, 0)
    grad, results = torch.randn(q.shape).half(), []
    for backend in ("triton", "reference"):
        with backends.use(backend):
            out, lse, rest = partial.forward(q, k, v, call, 0.2, torch.float32)
            sums = torch.ones(40, 2, 32), torch.ones(70, 2, 1, 32)
            grads = sums[0], sums[1][:, 0], sums[1][:, 1]
            partial.backward(grad, None, q, k, v, out, lse + 0.7, rest, call, 0.2, *grads)
            results.append((out, lse, *grads))
    assert results[0][0].dtype == torch.float32
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    assert (results[0][3][:10] == 1).all() and not (results[0][3][10:] == 1).all()


# -------------------------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_codes_and_scales_bit_by_bit(dtype):
    """Ties, the smallest codes, halves between them, zeros: what torch rounds to."""
    top = _cache.LARGEST_CODE[dtype]
    grid = torch.linspace(-top, top, 8 * 1016 + 1)[: 254 * 32].view(254, 32)
    small = torch.arange(32) * 2.0**-11  # fp8: halves and quarters of its smallest code
    x = torch.cat([grid, small[None], torch.zeros(1, 32)])
    x[:-1, 0] = top  # scale 1
    tokens = len(x)
    k_cache, v_cache = (torch.zeros(1, tokens, 1, 32).to(dtype) for _ in "kv")
    k_scale, v_scale = torch.full((1, tokens, 1), 7.0), torch.full((1, tokens, 1), 7.0)
    empty = torch.zeros(1, dtype=torch.int32)
    append_kv(x[:, None], 3 * x[:, None], k_cache, v_cache, _offsets(tokens), empty, k_scale=k_scale, v_scale=v_scale)
    for cache, scale, given in ((k_cache, k_scale, x), (v_cache, v_scale, 3 * x)):
        codes, factors = _cache.quantise(given, dtype)
        testing.assert_bit_equal(cache[0, :, 0], codes)
        testing.assert_bit_equal(scale[0, :, 0], factors)


def test_every_float8_code_is_read():
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    cache = codes.view(torch.float8_e4m3fn).view(1, 1, 1, 256)
    ones, q = torch.ones(1, 1, 1), torch.zeros(1, 1, 256)
    out = decode_attention(q, cache, cache, _offsets(1), torch.ones(1, dtype=torch.int32), k_scale=ones, v_scale=2 * ones)
    testing.assert_bit_equal(out[0, 0] + 0.0, 2 * codes.view(torch.float8_e4m3fn).float() + 0.0)


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_wild_lengths_and_blocks_touch_nothing_outside():
    from longvita_kernels.triton import append_kv as append
    from longvita_kernels.triton import decode_attention as decode

    q, _ = _inside((5, 2, 16))
    (k_cache, k_margins), (v_cache, v_margins) = (_inside((3, 4, 1, 16)) for _ in "kv")
    before = k_cache.clone()
    tables = [_int32(0, 2), _int32(99, -1), _int32(2**31 - 1, 1)]
    for wild, table in itertools.product(((-5, 10**9), (8, 2**31 - 1), (3, 9)), tables):
        table = table.repeat(2, 1)
        for cu in (_offsets(2, 3), _int32(0, 10**9, 5), _int32(4, -7, 3)):
            out, lse = decode.decode(q, k_cache, v_cache, cu, _int32(*wild), table, None, None, -1, 0, 0.0, 0.25)
            assert out[:2].shape == (2, 2, 16) and not out[lse.T.isfinite()].isnan().any()
            append.append(q[:, :1], q[:, 1:], k_cache, v_cache, cu, _int32(*wild), table, None, None)
            assert all(margin.isnan().all() for margin in (*k_margins, *v_margins))
    assert not torch.equal(before, k_cache) and k_cache.isfinite().all()


def test_a_full_cache_is_left_alone():
    from longvita_kernels.triton import append_kv as append

    k_cache, v_cache = torch.zeros(2, 3, 1, 16), torch.zeros(2, 3, 1, 16)
    x = torch.ones(4, 1, 16)
    append.append(x, x, k_cache, v_cache, _offsets(2, 2), _int32(3, 2), None, None, None)
    assert not k_cache[0].any() and k_cache[1, :, 0, 0].tolist() == [0, 0, 1]


def test_other_sequences_change_no_bit():
    """The split follows from the shape of the cache and the sequence's own length."""
    q, (k, v) = torch.randn(3, 4, 32), torch.randn(2, 3, 700, 2, 32).unbind(0)
    together = decode_attention(q, k, v, _offsets(1, 1, 1), _int32(650, 20, 301))
    for b, length in enumerate((650, 20, 301)):
        alone = decode_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], _offsets(1), _int32(length))
        testing.assert_bit_equal(alone, together[b : b + 1])
