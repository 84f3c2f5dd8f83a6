"""Packed attention for Hopper (csrc/cuda/attention_*) on the emulator: the kernels' own source, held to the op's definition.

What that proves and what it cannot: csrc/README.md, "Attention on Hopper".
"""

import dataclasses
import itertools
import math

import pytest
import torch

from longvita_kernels import merge_attention, testing
from longvita_kernels.ops.varlen_attention import SPEC, reference
from longvita_kernels.spec import SampleInput
from tests.cuda.emulated import EmulatorError, Machine, compile_library

BF16, FP16 = torch.bfloat16, torch.float16


def _op(machine):
    """varlen_attention on a machine: forward and backward kernels behind the op's signature."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, cu_q, cu_k, settings):
            out, lse, rest = machine.forward(q, k, v, cu_q, cu_k, *settings)
            ctx.save_for_backward(q, k, v, out, lse, rest, cu_q, cu_k)
            ctx.settings = settings
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx, grad_out, grad_lse):
            q, k, v, out, *others = ctx.saved_tensors
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
            needs = zip((q, k, v), ctx.needs_input_grad[:3], strict=True)
            grads = [torch.empty(x.shape, dtype=x.dtype) if need else None for x, need in needs]
            machine.backward(grad_out, grad_lse, q, k, v, out, *others, *ctx.settings, *grads)
            return *grads, None, None, None

    def op(q, k, v, cu_seqlens_q, cu_seqlens_k, *, causal=True, softmax_scale=None, window_size=(-1, -1), return_lse=True):
        scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
        settings = scale, window_size[0], 0 if causal else window_size[1]
        return Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, settings)

    return op


def _offsets(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _sample(label, lengths_q, heads, dim, dtype, lengths_k=None, *, strided=False, **options):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    sizes = [(sum(lengths_q), heads[0]), (sum(lengths_k), heads[1]), (sum(lengths_k), heads[1])]
    if strided:
        q, k, v = torch.randn(sizes[0][0], heads[0] + 2 * heads[1], dim).to(dtype).split([heads[0], heads[1], heads[1]], dim=1)
    else:
        q, k, v = (torch.randn(*size, dim).to(dtype) for size in sizes)
    return SampleInput(label, (q, k, v, _offsets(*lengths_q), _offsets(*lengths_k)), {"return_lse": True, **options}, ("q", "k", "v"))


def _samples():
    yield _sample("causal, packed, empty and single documents, group of 2", (300, 17, 0, 1, 140), (4, 2), 128, BF16)
    yield _sample("one document, whole tiles", (256,), (1, 1), 128, BF16)
    yield _sample("group of 5, strided qkv, fp16", (70, 200), (5, 1), 128, FP16, strided=True)
    yield _sample("D 64, strided qkv", (130, 129, 64), (4, 2), 64, BF16, strided=True)
    yield _sample("Tq differs from Tk, rows that see nothing", (50, 220, 30, 5), (2, 2), 128, BF16, (10, 300, 0, 129))
    yield _sample("not causal, Tq differs from Tk", (50, 120, 0), (2, 1), 64, FP16, (310, 60, 9), causal=False)
    yield _sample("window to the left", (350, 200), (1, 1), 128, BF16, window_size=(70, -1))
    both = {"causal": False, "window_size": (70, 33), "softmax_scale": 0.3}
    yield _sample("window on both sides, scale", (350, 200), (2, 1), 64, FP16, (250, 400), **both)
    yield _sample("window beside the diagonal", (260,), (1, 1), 128, BF16, (500,), causal=False, window_size=(0, 0))
    yield _sample("large scores, whose peaks keep growing", (400,), (1, 1), 64, BF16, softmax_scale=2.0)


def _check(machine, sample, **choice):
    return testing.check_sample(dataclasses.replace(SPEC, op=_op(machine)), sample, **choice)


BOTH = pytest.mark.parametrize("single_pass", (True, False), ids=("single pass", "two passes"))


@BOTH
@pytest.mark.parametrize("index", range(10))
def test_forward_and_gradients_are_accurate(index, single_pass):
    _check(Machine.shared(single_pass), list(_samples())[index])


@BOTH
def test_frozen_inputs_and_unused_outputs(single_pass):
    sample = _sample("", (90, 140), (2, 1), 64, BF16)
    for wrt in (("q",), ("k",), ("v", "q")):
        _check(Machine.shared(single_pass), sample, wrt=wrt)
    for used in (("out",), ("lse",)):
        _check(Machine.shared(single_pass), sample, used=used)


def _everything(machine, sample):
    found = testing.run(_op(machine), SPEC, sample)
    return [*found.outputs.values(), *found.grads.values()]


@BOTH
def test_order_of_threads_copies_and_tiles_changes_no_bit(single_pass):
    sample, library = _sample("", (300, 3, 140), (4, 2), 64, BF16), compile_library()
    machines = [Machine(library, *each, single_pass=single_pass) for each in ((1, 0), (3, 0), (2, 1), (3, 2), (4, 3))]
    found = [_everything(machine, sample) for machine in machines]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            testing.assert_bit_equal(a, b)


@BOTH
def test_another_document_changes_no_bit(single_pass):
    """Even where it is full of NaN: tiles reach beyond the end of a document, and what they reach must not count."""
    found = []
    for value in (None, math.nan, math.inf):
        torch.manual_seed(0)
        sample = _sample("", (100, 180, 77), (2, 1), 64, BF16, (100, 200, 33))
        q, k, v = sample.args[:3]
        if value:
            for x, mine in ((q, slice(100, 280)), (k, slice(100, 300)), (v, slice(100, 300))):
                kept = x[mine].clone()
                x.fill_(value)
                x[mine] = kept
        out, lse, *grads = _everything(Machine.shared(single_pass), sample)
        found.append([out[100:280], lse[:, 100:280], grads[0][100:280], grads[1][100:300], grads[2][100:300]])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            testing.assert_bit_equal(a, b)


def test_keys_beyond_a_document_do_not_count_where_all_are_seen():
    """Scores so low that a row of zeros in their place would overflow: such rows of a tile must be masked, not only cleared."""
    sample = _sample("", (40, 30), (1, 1), 64, BF16, causal=False, softmax_scale=4.0)
    q, k = sample.args[:2]
    direction = q[:1].clone()
    q.copy_(direction * (1 + torch.rand(70, 1, 1)))
    k.copy_(direction * -(1 + torch.rand(70, 1, 1) / 64))
    assert (_everything(Machine.shared(), sample)[1] < -128).all()  # lse
    _check(Machine.shared(), sample)


WINDOWS = [(-1, 0), (-1, -1), (70, 0), (200, -1), (-1, 90), (30, 40), (0, 0), (300, 5)]


def _backward_alone(machine, lengths_q, lengths_k, left, right, heads=(1, 1)):
    """A backward of dim 64 for its order alone: lse of rows that see nothing, so every gradient is 0."""
    q, k = torch.randn(sum(lengths_q), heads[0], 64).to(BF16), torch.randn(sum(lengths_k), heads[1], 64).to(BF16)
    lse = torch.full((heads[0], len(q)), -torch.inf)
    grads = [torch.full_like(x, math.nan) for x in (q, k, k)]
    machine.backward(q, None, q, k, k, q, lse, torch.zeros_like(lse), _offsets(*lengths_q), _offsets(*lengths_k), 0.1, left, right, *grads)
    for grad in grads:
        assert not grad.any()


def test_tiles_wait_only_for_those_taken_before():
    """So one multiprocessor comes to an end, and so do many in any order, whatever is seen."""
    library = compile_library()
    for case, (left, right) in enumerate(WINDOWS):
        machine = Machine(library, (1, 3, 5)[case % 3], case)
        _backward_alone(machine, (400, 0, 130), (260, 3, 390) if case % 2 else (520, 0, 140), left, right)
        entries = _key_entries(machine, 530, 653 if case % 2 else 660, 3)
        assert all(first == sorted(first) for first in entries.values()) and sum(map(len, entries.values())) >= 7


def _key_entries(machine, tokens_q, tokens_k, documents):
    """{document: first rows of its tiles} as the last backward's list of tiles of keys has them."""
    def rounded(size):
        return (size + 255) // 256 * 256

    slots_q, slots_k = tokens_q // 128 + documents, tokens_k // 128 + documents
    at = rounded(8 * slots_q) + rounded(4 * slots_q) + 256
    entries = machine.scratch[at : at + 8 * slots_k].view(torch.int32).view(slots_k, 2).tolist()
    counter = at + rounded(8 * slots_k) + rounded(4 * slots_k)
    count, found = machine.scratch[counter : counter + 4].view(torch.int32).item(), {}
    for document, first in entries[:count]:
        found.setdefault(document, []).append(first)
    return found


def test_longest_tiles_come_first():
    q, k, v = (torch.randn(1200, 1, 64).to(BF16) for _ in "qkv")
    offsets = _offsets(200, 640, 0, 360)
    machine = Machine(compile_library())
    machine.forward(q, k, v, offsets, offsets, 0.1, -1, 0)
    slots = 1200 // 128 + 4
    entries = machine.scratch[: 8 * slots].view(torch.int32).view(slots, 2).tolist()
    tiles = [(1, 512), (1, 384), (3, 256), (1, 256), (3, 128), (1, 128), (0, 128), (3, 0), (1, 0), (0, 0)]
    seen = {tile: min(tile[1] + 128, (200, 640, 0, 360)[tile[0]]) for tile in tiles}
    found = [tuple(entry) for entry in entries[: len(tiles)]]
    assert sorted(found) == sorted(tiles)
    assert [tile for tile in found if seen[tile] == 128] == [(0, 0), (1, 0), (3, 0)]  # ties: in the order of their slots
    costs = [seen[tile] for tile in found]
    assert all(later <= 1.07 * earlier for earlier, later in itertools.pairwise(costs))  # buckets of 6 %


def _inside(shape, margin=4096, dtype=BF16):
    """A tensor of random numbers between two margins of NaN, and the margins."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 2 * margin,), math.nan, dtype=dtype)
    tensor = memory[margin : margin + size].view(shape)
    tensor.copy_(torch.randn(shape))
    return tensor, (memory[:margin], memory[-margin:])


@BOTH
@pytest.mark.parametrize("wild", [(0, 10**9, -5, 7), (-(10**9), 3, 2, 2**31 - 1), (150, 100, 10, 0), (5, 5, 5, 5), (-9, 20, 10**9, 10**9)])
def test_wild_offsets_touch_nothing_outside(wild, single_pass):
    """On a GPU nobody looks at their values: numbers may be wrong, addresses not (the emulator would say so), and nobody waits for ever."""
    machine, shapes = Machine.shared(single_pass), [(200, 2, 64), (200, 1, 64), (200, 1, 64)]
    (q, k, v), _ = zip(*(_inside(shape) for shape in shapes), strict=True)
    (out, out_margins), *grads = (_inside(shape) for shape in (shapes[0], *shapes))
    out.zero_()
    cu, tame = torch.tensor(wild, dtype=torch.int32), _offsets(70, 0, 130)
    for cu_q, cu_k in ((cu, tame), (tame, cu), (cu, cu)):
        _, lse, rest = machine.forward(q, k, v, cu_q, cu_k, 0.3, -1, 0, out=out)
        known = lse.isfinite() & rest.isfinite()  # rows of no document are left as they were
        lse, rest = torch.where(known, lse, -torch.inf), torch.where(known, rest, 0.0)
        machine.backward(torch.ones_like(out), None, q, k, v, out, lse, rest, cu_q, cu_k, 0.3, -1, 0, *(grad for grad, _ in grads))
        for tensor, margins in ((out, out_margins), *grads):
            assert tensor.isfinite().all() and all(margin.isnan().all() for margin in margins)


def test_offsets_beyond_32_bits():
    """Memory that is never touched costs nothing: tokens that lie 2²⁴ elements apart."""
    tokens, stride, dim = 200, 1 << 24, 64
    far = torch.empty(tokens * stride, dtype=BF16).as_strided((tokens, 1, dim), (stride, dim, 1))
    far.copy_(torch.randn(tokens, 1, dim))
    assert (tokens - 1) * stride > 2**31
    offsets, found = _offsets(150, 50), []
    for x in (far, far.contiguous()):
        out, lse, rest = Machine.shared().forward(x, x, x, offsets, offsets, 0.25, -1, 0)
        grads = [torch.empty(y.shape, dtype=BF16) for y in (x, x, x)]
        Machine.shared().backward(x, None, x, x, x, out, lse, rest, offsets, offsets, 0.25, -1, 0, *grads)
        found.append((out, lse, *grads))
    for a, b in zip(*found, strict=True):
        testing.assert_bit_equal(a, b)


@BOTH
def test_wide_partial_results_and_gradients_on_top_of_given_ones(single_pass):
    """What ring attention does: two parts of the keys, each in float32, merged; gradients of each part from the whole lse."""
    machine, scale = Machine.shared(single_pass), 0.2
    q, k, v = (torch.randn(tokens, heads, 64).to(FP16) for tokens, heads in ((140, 2), (210, 1), (210, 1)))
    documents = _offsets(140)
    parts = [(slice(0, 70), _offsets(70), -1), (slice(70, 210), _offsets(140), 0)]  # the later part is on the diagonal
    partial = [machine.forward(q, k[at], v[at], documents, cu_k, scale, -1, right, out=torch.empty(q.shape)) for at, cu_k, right in parts]
    assert partial[0][0].dtype == torch.float32
    out, lse = merge_attention(*partial[0][:2], *partial[1][:2])
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = reference(*leaves, documents, _offsets(210), softmax_scale=scale)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=2e-3, atol=2e-4)
    grad = torch.randn(out.shape).to(FP16)
    for dtype, tolerance in ((torch.float32, 3e-3), (FP16, 1e-2)):
        dq, dk, dv = (torch.full(x.shape, 1.0, dtype=dtype) for x in (q, k, v))
        for at, cu_k, right in parts:
            rest = torch.zeros_like(lse)
            gradients = (dq, dk[at], dv[at])
            machine.backward(grad, None, q, k[at], v[at], out.to(FP16), lse, rest, documents, cu_k, scale, -1, right, *gradients, add=True)
        wanted = torch.autograd.grad(expected, leaves, grad.double(), retain_graph=True)
        for got, want in zip((dq, dk, dv), wanted, strict=True):
            torch.testing.assert_close(got.double() - 1, want, rtol=tolerance, atol=tolerance)


@BOTH
def test_no_tokens_and_no_documents(single_pass):
    machine, none = Machine.shared(single_pass), torch.empty(0, 2, 64, dtype=BF16)
    some = torch.randn(70, 2, 64).to(BF16)
    out, lse, _ = machine.forward(none, none, none, _offsets(0), _offsets(0), 0.3, -1, 0)
    assert out.shape == (0, 2, 64) and lse.shape == (2, 0)
    out, lse, rest = machine.forward(some, none, none, _offsets(70), _offsets(0), 0.3, -1, 0)
    assert not out.any() and (lse == -torch.inf).all() and not rest.any()
    grads = [torch.full(x.shape, math.nan, dtype=BF16) for x in (some, none, none)]
    machine.backward(some, None, some, none, none, out, lse, rest, _offsets(70), _offsets(0), 0.3, -1, 0, *grads)
    assert not grads[0].any()
    grads = [torch.full(x.shape, math.nan, dtype=BF16) for x in (none, some, some)]
    machine.backward(none, None, none, some, some, none, lse[:, :0], rest[:, :0], _offsets(0), _offsets(70), 0.3, -1, 0, *grads)
    assert not grads[1].any() and not grads[2].any()


@pytest.mark.parametrize(
    "change, why",
    [
        ({"dim": 32}, "head dimension must be 64 or 128"),
        ({"dtype": torch.float32}, "bfloat16 or float16"),
        ({"softcap": 2.0}, "no softcap"),
        ({"shift": 1}, "k does not begin at a multiple of 16 bytes"),
        ({"stride": 68}, "k's tokens are not multiples of 16 bytes apart"),
        ({}, ""),
    ],
)
def test_what_they_cannot_is_said(change, why):
    dtype, dim, stride, shift = change.get("dtype", BF16), change.get("dim", 64), change.get("stride", 72), change.get("shift", 0)
    q = torch.randn(20, 2, dim).to(dtype)
    k = torch.empty(4000, dtype=dtype).as_strided((20, 1, dim), (stride, dim, 1), shift)
    said = Machine.shared().cannot(q, k, k, _offsets(20), _offsets(20), 0.3, -1, 0, softcap=change.get("softcap", 0.0))
    assert (why in said) if why else said == ""
    if why and not change.get("softcap"):
        with pytest.raises(ValueError, match=why):
            Machine.shared().forward(q, k, k, _offsets(20), _offsets(20), 0.3, -1, 0)


# ------------------------------------------------------------------------------------------------------------- kernels that are wrong

FORWARD, BACKWARD, TILES, SINGLE = (f"attention_{part}.cuh" for part in ("forward", "backward", "tiles", "single_pass"))
GIVE_K = "if (lane() == 0) barrier_arrive(s.k_empty[k_ring.stage]);\n"
GIVE_V = "if (lane() == 0) barrier_arrive(s.v_empty[v_ring.stage]);\n"
PASS_TURN = "named_arrive(kTurn + (half ^ 1), kBoth);\n"
IN_LOOP = "\n        "
EACH = f"{IN_LOOP}LV_UNROLL{IN_LOOP}for (int "
CLEAR = "clear_rows(s.v[v_ring.stage], tile.columns - start);"
SEND = "stores_commit();\n        stores_read();\n        "
WRONG = None  # the results are wrong
# Name: (file, what stands there, what is put in its place, words of the emulator or WRONG).
MUTANTS = {
    "K is never given back": (FORWARD, f"{IN_LOOP}multiply_wait<1>();{IN_LOOP}{GIVE_K}", f"{IN_LOOP}multiply_wait<1>();\n", "deadlock"),
    "Q is given back while it is read": (
        FORWARD, "named_sync(kTurn + half, kBoth);\n",
        "named_sync(kTurn + half, kBoth);\nif (lane() == 0 && i + 1 == tile.count) barrier_arrive(s.q_empty);\n", "too many|on its way",
    ),
    "V is given back while it is read": (FORWARD, PASS_TURN, f"{PASS_TURN}{GIVE_V}", "too many|on its way"),
    "scores are not waited for": (FORWARD, "multiply_wait<1>();\n", "\n", "accumulators .* changed"),
    "sums are not waited for": (FORWARD, f"{IN_LOOP}multiply_wait<0>();{IN_LOOP}{GIVE_V}", IN_LOOP + GIVE_V, "changed while a wgmma"),
    "both warpgroups wait for their turn": (
        FORWARD, "if (half == 1) named_arrive", "if (half == 2) named_arrive", r"deadlock[\s\S]*named barrier 1",
    ),
    "values beyond a document stay": (FORWARD, CLEAR, "", WRONG),
    "zeros that products do not see": (FORWARD, "async_fence();", "", "without an async_fence"),
    "sums are not rescaled": (FORWARD, "softmax.rescale(out);", "{}", WRONG),
    "the mask is one too far": (TILES, "aligned + right + 1, int64_t(columns)", "aligned + right + 2, int64_t(columns)", WRONG),
    "a row beyond a document is written": (TILES, "= row + 8 * h < rows;", "= row + 8 * h <= rows;", "outside of global memory"),
    "V's second half is its first": (TILES, "kSwizzleRow * 2, Panel<ROWS, D>::kHalf), true", "kSwizzleRow * 2, 0), true", WRONG),
    "a barrier expects too little": (BACKWARD, "kBytes + 2 * kStats", "kBytes + kStats", "on its way"),
    "a stage is given back too early": (BACKWARD, "multiply_wait<0>();     // meanwhile", "// meanwhile", "on its way|changed"),
    "g·v is not waited for": (BACKWARD, f"multiply_wait<0>();{EACH}e", f"{EACH}e", "changed while a wgmma"),
    "rows beyond a document stay": (BACKWARD, "tile.columns - start < Shared::BLOCK;", "false;", WRONG),
    "keys beyond a document stay": (BACKWARD, "Shared::SINGLE && tile.rows - tile.first < kTile;", "false;", WRONG),
    "dS is overwritten while it is read": (SINGLE, "barrier_wait(b.slopes_empty[step & 1], (step >> 1 & 1) ^ 1);", "", WRONG),
    "dS is not waited for": (SINGLE, "barrier_wait(b.slopes_full[step & 1], step >> 1 & 1);", "(void)b;", WRONG),
    "dS that products do not see": (
        SINGLE, "async_fence();\n  warp_sync();\n  if (lane() == 0) barrier_arrive(b.slopes_full",
        "warp_sync();\n  if (lane() == 0) barrier_arrive(b.slopes_full", "without an async_fence",
    ),
    "dq is not waited for": (BACKWARD, "            multiply_wait<2>();\n", "", WRONG),
    "sums that copies do not see": (
        SINGLE, "async_fence();\n  warp_sync();\n  if (lane() == 0) barrier_arrive(b.sums_full",
        "warp_sync();\n  if (lane() == 0) barrier_arrive(b.sums_full", "without an async_fence",
    ),
    "sums are overwritten": (SINGLE, "barrier_wait(b.sums_empty[half], (step & 1) ^ 1);", "", "that a store has not read yet"),
    "what is added is not waited for": (
        SINGLE, "barrier_wait(b.sums_full[half], step & 1);", "", "without an async_fence|has not read yet",
    ),
    "sums are given back before they are read": (SINGLE, SEND, "stores_commit();\n        ", "that a store has not read yet"),
    "a turn is not waited for": (SINGLE, "wait_at_least(sums.turns + at, before);", "", "out of turn|under way"),
    "a turn is given away before its sums are added": (SINGLE, "stores_wait();", "", "out of turn|under way"),
    "copies know nothing of turns": (SINGLE, "global_fence();", "", "out of turn"),
    "a turn is not given away": (SINGLE, "raise(sums.turns + at);", "", "deadlock"),
    "turns begin at the lowest keys of all": (SINGLE, "int before = tile.first / kTile - int(sees / kTile);",
                                              "int before = tile.first / kTile + 0 * int(sees);", "deadlock"),
    "the first adds as well": (SINGLE, "if (before == 0)", "if (before < 0)", WRONG),
    "turns are not set to nothing": (BACKWARD, "if (p.sums.turns && thread() < 2)", "if (false)", "deadlock"),
}  # fmt: skip
TWO_PASSES = ("g·v is not waited for", "rows beyond a document stay")
WINDOW = ("turns begin at the lowest keys of all",)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name):
    """Every synchronisation and limit that matters, taken away: the emulator or the accuracy rule says so."""
    *replacement, words = MUTANTS[name]
    single_pass = name not in TWO_PASSES
    machine = Machine(compile_library((tuple(replacement),)), single_pass=single_pass)
    window = (60, -1) if name in WINDOW else (-1, -1)
    sample = _sample("", (350, 300, 70), (2, 1), 128, BF16, (390, 500, 33), softmax_scale=1.0, window_size=window)
    for x in sample.args[1:3]:
        x[390 + 500 :] = math.nan  # of the last document: what no tile of those before may let in

    def first_documents(machine):
        out, lse, dq, *_ = _everything(machine, sample)
        return [out[:650], lse[:, :650], dq[:650]]

    def compare():
        for got, good in zip(first_documents(machine), first_documents(Machine.shared(single_pass)), strict=True):
            testing.assert_bit_equal(got, good)

    with pytest.raises(EmulatorError if words else AssertionError, match=words):
        compare()


@pytest.mark.slow
def test_in_another_order_tiles_would_wait_for_ever():
    """Most work first puts the last keys first where queries see those on their right."""
    machine = Machine(compile_library((("attention_backward.cu", "keys.heads, stream, single)", "keys.heads, stream)"),)), 1)
    with pytest.raises(EmulatorError, match="waits for a number in global memory to be at least"):
        _backward_alone(machine, (400,), (400,), 200, -1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 13))
def test_no_order_of_random_problems_waits_for_ever(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    for _ in range(4):
        machine = Machine(compile_library(), draw(1, 9, 1)[0], draw(0, 1000, 1)[0])
        group, kv_heads = draw(1, 3, 2)
        _backward_alone(machine, draw(0, 500, 3), draw(0, 700, 3), *draw(-1, 300, 2), heads=(group * kv_heads, kv_heads))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_random_problems_in_random_order(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).tolist()

    machine = Machine(compile_library(), draw(1, 5, 1)[0], seed, single_pass=seed % 4 > 0)
    for dim in (64, 128):
        lengths_q, lengths_k = draw(0, 400, 2, 4)
        group, kv_heads = draw(1, 4, 2)
        left, right = draw(-1, 200, 2)
        causal = draw(0, 2, 1)[0] == 1
        options = {"causal": causal, "window_size": (left, right)}
        dtype, heads = (BF16, FP16)[draw(0, 2, 1)[0]], (group * kv_heads, kv_heads)
        _check(machine, _sample(f"{lengths_q} {lengths_k} {options}", lengths_q, heads, dim, dtype, lengths_k, **options))
