"""varlen_attention beyond what every OpSpec is tested for: who sees whom, by hand; isolation of documents; memory; threads; messages."""

import sys

import pytest
import torch

from bench.varlen_attention import in_blocks
from longvita_kernels import backends, native, testing, varlen_attention
from longvita_kernels.ops import varlen_attention as module


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def visible(queries, keys, **kwargs):
    """Which keys each query of one document sees, read off the output: zero queries weigh visible keys evenly, values are unit vectors."""
    k = torch.randn(keys, 1, 32)
    v = torch.eye(32)[:keys].unsqueeze(1)
    out = varlen_attention(torch.zeros(queries, 1, 32), k, v, offsets(queries), offsets(keys), **kwargs)
    seen = [(row[0] > 0).nonzero().flatten().tolist() for row in out]
    for row, keys_seen in zip(out, seen, strict=True):
        torch.testing.assert_close(row[0, keys_seen], torch.full((len(keys_seen),), 1 / max(len(keys_seen), 1)))
    return seen


@pytest.fixture(params=("native", "torch", "reference"))
def backend(request):
    backends.use(request.param)
    return request.param


# ---------------------------------------------------------------------------------------------------------------------- who sees whom


def test_causal_is_aligned_bottom_right(backend):
    assert visible(3, 3) == [[0], [0, 1], [0, 1, 2]]
    assert visible(2, 4) == [[0, 1, 2], [0, 1, 2, 3]]
    assert visible(4, 2) == [[], [], [0], [0, 1]]
    assert visible(2, 0) == [[], []]


def test_windows_beyond_every_number_of_tokens_hide_nothing(backend):
    far = sys.maxsize
    assert visible(2, 3, causal=False, window_size=(far, far)) == [[0, 1, 2], [0, 1, 2]]
    assert visible(4, 2, causal=False, window_size=(far, 0)) == visible(4, 2)
    assert visible(2, 4, causal=False, window_size=(0, far)) == visible(2, 4, causal=False, window_size=(0, -1))
    assert visible(3, 3, causal=False, window_size=(2**31 - 2, 2**31 - 2)) == [[0, 1, 2]] * 3
    assert visible(3, 3, causal=False, window_size=(2**70, 0)) == visible(3, 3)


def test_not_causal_sees_everything(backend):
    assert visible(2, 3, causal=False) == [[0, 1, 2], [0, 1, 2]]


def test_windows(backend):
    assert visible(4, 4, window_size=(1, -1)) == [[0], [0, 1], [1, 2], [2, 3]]
    assert visible(4, 4, window_size=(0, 5)) == [[0], [1], [2], [3]]  # causal wins over the right side
    assert visible(4, 4, causal=False, window_size=(1, 1)) == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert visible(3, 5, causal=False, window_size=(1, 0)) == [[1, 2], [2, 3], [3, 4]]
    assert visible(5, 3, causal=False, window_size=(-1, 1)) == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2]]
    assert visible(3, 3, causal=False, window_size=(0, -1)) == [[0, 1, 2], [1, 2], [2]]


def test_window_edges_at_every_offset(backend):
    """Register tiles and key blocks must not shift the mask: every document length up to past a block, two-sided window."""
    for keys in (31, 32, 30, 29):
        for left, right in ((0, 3), (7, 0), (5, 9)):
            expected = [list(range(max(0, i - left), min(keys, i + right + 1))) for i in range(keys)]
            assert visible(keys, keys, causal=False, window_size=(left, right)) == expected


def test_rows_that_see_nothing(backend):
    q, k, v = (torch.randn(n, 2, 32, requires_grad=True) for n in (5, 3, 3))
    out, lse = varlen_attention(q, k, v, offsets(5), offsets(3), return_lse=True)
    assert torch.equal(out[:2], torch.zeros(2, 2, 32)) and torch.equal(lse[:, :2], torch.full((2, 2), -torch.inf))
    assert lse[:, 2:].isfinite().all()
    grads = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
    assert all(grad.isfinite().all() for grad in grads) and torch.equal(grads[0][:2], torch.zeros(2, 2, 32))


def test_keys_that_nobody_sees_have_gradient_zero(backend):
    q, k, v = (torch.randn(n, 1, 32, requires_grad=True) for n in (4, 9, 9))
    out = varlen_attention(q, k, v, offsets(4, 0), offsets(4, 5))
    with testing.poisoned_empty():
        grad_k, grad_v = torch.autograd.grad(out.sum(), [k, v])
    assert torch.equal(grad_k[4:], torch.zeros(5, 1, 32)) and torch.equal(grad_v[4:], torch.zeros(5, 1, 32))


def test_lse_by_hand_and_its_gradient(backend):
    q, k, v = (torch.randn(6, 1, 32) for _ in range(3))
    q.requires_grad_()
    _, lse = varlen_attention(q, k, v, offsets(6), causal=False, softmax_scale=0.5, return_lse=True)
    scores = q.detach()[:, 0].double() @ k[:, 0].double().T * 0.5
    torch.testing.assert_close(lse[0].double(), scores.logsumexp(1), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(lse.sum(), q)
    torch.testing.assert_close(grad[:, 0].double(), 0.5 * scores.softmax(1) @ k[:, 0].double(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------------- isolation


def run(q, k, v, cu, **kwargs):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = varlen_attention(q, k, v, cu, return_lse=True, **kwargs)
    grads = torch.autograd.grad([out, lse], [q, k, v], [torch.cos(out.detach()), torch.sin(lse.detach())])
    return out.detach(), lse.detach().T, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_does_not_touch_another(dtype):
    lengths = (17, 1, 300, 64, 0, 5)
    cu = offsets(*lengths)
    q, k, v = torch.randn(387, 8, 64).to(dtype).split([4, 2, 2], dim=1)
    before = run(q, k, v, cu)
    changed = [x.clone() for x in (q, k, v)]
    begin, end = cu[2].item(), cu[3].item()
    for x in changed:
        x[begin:end] = float("nan")
    after = run(*changed, cu)
    for old, new in zip(before, after, strict=True):
        testing.assert_bit_equal(old[:begin], new[:begin])
        testing.assert_bit_equal(old[end:], new[end:])
        assert new[begin:end].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_alone(dtype):
    lengths = (40, 3, 200, 1, 17, 17)
    cu = offsets(*lengths)
    q, k, v = torch.randn(sum(lengths), 5, 40).to(dtype).split([3, 1, 1], dim=1)
    packed = run(q, k, v, cu)
    for i, length in enumerate(lengths):
        rows = slice(int(cu[i]), int(cu[i + 1]))
        alone = run(q[rows], k[rows], v[rows], offsets(length))
        for together, single in zip(packed, alone, strict=True):
            testing.assert_bit_equal(together[rows], single)


# ------------------------------------------------------------------------------------------- long documents, threads, memory, strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "dim", "kwargs"), [
    ((300, 21, 470), 256, {}),
    ((700,), 64, {"causal": False, "window_size": (120, -1)}),
    ((1300,), 32, {"softcap": 3.0}),
])  # fmt: skip
def test_bit_equal_for_any_number_of_threads(dtype, lengths, dim, kwargs):
    """The documents span several key partitions of the backward, whose shares of dq must be added in one order."""
    q, k, v = torch.randn(sum(lengths), 4, dim).to(dtype).split([2, 1, 1], dim=1)
    results = []
    for threads in (1, 2, 4, 3, 2):
        torch.set_num_threads(threads)
        results.append(run(q, k, v, offsets(*lengths), **kwargs))
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            testing.assert_bit_equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_partitions_are_accurate(dtype):
    q, k, v = (torch.randn(n, 1, 256).to(dtype) for n in (280, 400, 400))
    sample = module.SampleInput("long", (q, k, v, offsets(280), offsets(400)), {"return_lse": True}, ("q", "k", "v"))
    testing.check_sample(module.SPEC, sample)


@pytest.mark.parametrize("lengths", [(512, 4096), pytest.param((1024, 16384), marks=pytest.mark.slow)])
def test_gradient_error_does_not_grow_with_the_document(lengths):
    """Gradients of keys add up over all queries: in bf16 sums their error would double from 1,024 to 4,096 tokens."""
    errors = {}
    for length in lengths:
        q, k, v, grad = (torch.randn(length, 1, 64).bfloat16() for _ in range(4))
        cu = offsets(length)
        got = _gradients(lambda *x, cu=cu: varlen_attention(*x, cu), (q, k, v), grad)
        ref = in_blocks(q, k, v, cu, grad, True, torch.float64, (0,))[1:]
        errors[length] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, ref, strict=True)]
    for short, long in zip(*(errors[length] for length in lengths), strict=True):
        assert long < 1.1 * short, errors


def _gradients(function, inputs, grad):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def test_no_memory_of_queries_times_keys():
    length = 3000
    q, k, v = (torch.randn(length, 1, 32, requires_grad=True) for _ in range(3))
    torch.set_num_threads(1)
    with testing.poisoned_empty() as shapes:
        out = varlen_attention(q, k, v, offsets(length))
        out.sum().backward()
    largest = max(torch.Size(shape).numel() for shape in shapes)
    assert largest < length * length / 20, f"a tensor of {largest} elements for a document of {length} tokens"


def test_broadcast_gradient_and_strided_inputs():
    qkv = torch.randn(50, 6, 40)
    q, k, v = (x.detach().requires_grad_() for x in qkv.split([4, 1, 1], dim=1))
    out = varlen_attention(q, k, v, offsets(20, 30))
    from_sum = torch.autograd.grad(out.sum(), [q, k, v], retain_graph=True)  # gradient with strides 0
    dense = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    for a, b in zip(from_sum, dense, strict=True):
        testing.assert_bit_equal(a, b)
    contiguous = varlen_attention(*(x.detach().contiguous() for x in (q, k, v)), offsets(20, 30))
    testing.assert_bit_equal(out.detach(), contiguous)


def test_empty_inputs_may_have_any_strides(backend):
    q = torch.zeros(32, 2, 3)[..., :0].permute(2, 1, 0).requires_grad_()
    assert q.stride(-1) != 1
    varlen_attention(q, q, q, offsets(0)).sum().backward()
    assert q.grad.shape == (0, 2, 32)


def test_offsets_past_two_to_the_31():
    far = 2**31 + 64
    storage = torch.empty(far + 64, dtype=torch.bfloat16)  # untouched pages cost nothing
    q = storage.as_strided((2, 1, 32), (far, 32, 1))
    q.copy_(torch.randn(2, 1, 32))
    near = q.clone()
    testing.assert_bit_equal(varlen_attention(q, q, q, offsets(2)), varlen_attention(near, near, near, offsets(2)))


def test_scale_that_is_not_positive_runs_on_the_reference():
    q, k, v = (torch.randn(9, 2, 32) for _ in range(3))
    for scale in (0.0, -0.2):
        ours = varlen_attention(q, k, v, offsets(4, 5), softmax_scale=scale)
        torch.testing.assert_close(ours, module.reference(q, k, v, offsets(4, 5), softmax_scale=scale))


def test_float64_runs_on_the_reference():
    q = torch.randn(5, 1, 32, dtype=torch.float64)
    out, lse = varlen_attention(q, q, q, offsets(5), return_lse=True)
    assert out.dtype == lse.dtype == torch.float64


def test_large_scores_do_not_overflow():
    q, k = torch.full((4, 1, 32), 1e4), torch.full((4, 1, 32), 1e4)
    v = torch.randn(4, 1, 32)
    out, lse = varlen_attention(q, k, v, offsets(4), causal=False, return_lse=True)
    torch.testing.assert_close(out[0], v.mean(0))
    torch.testing.assert_close(lse, torch.full((1, 4), 1e8 * 32 / 32**0.5))


# -------------------------------------------------------------------------------------------------------------------------- messages


def call(*, q=(10, 4, 32), k=(10, 2, 32), v=None, cu_q=(0, 4, 10), cu_k=None, dtype_k=torch.float32, **kwargs):
    k = torch.zeros(k, dtype=dtype_k)
    cu_k = None if cu_k is None else torch.tensor(cu_k, dtype=torch.int32)
    cu_q = cu_q if isinstance(cu_q, torch.Tensor) else torch.tensor(cu_q, dtype=torch.int32)
    q = torch.zeros(q) if isinstance(q, tuple) else q
    return varlen_attention(q, k, k if v is None else torch.zeros(v), cu_q, cu_k, **kwargs)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"q": (10, 128)}, r"q has shape \(10, 128\); expected \(Tq, Hq, D\)"),
    ({"k": (10, 2, 64)}, r"k has shape \(10, 2, 64\); expected .*32"),
    ({"v": (9, 2, 32)}, "v has shape .* expected the shape of k"),
    ({"q": (10, 3, 32)}, "q has 3 heads and k has 2; expected the query heads to be a multiple"),
    ({"q": (10, 4, 20), "k": (10, 2, 20)}, "head dimension 20; expected a multiple of 8"),
    ({"q": (10, 4, 264), "k": (10, 2, 264)}, "head dimension 264; .*at most 256"),
    ({"dtype_k": torch.float16}, "k has dtype torch.float16 but q has torch.float32; cast one"),
    ({"q": torch.zeros(10, 4, 32, dtype=torch.int32)}, "q has dtype int32; expected one of float32"),
    ({"q": torch.zeros(10, 4, 64)[..., ::2]}, r"stride 2 in its last dimension; expected 1. Remedy: q.contiguous\(\)"),
    ({"cu_q": (0, 4, 9)}, "cu_seqlens_q ends at 9 but there are 10 tokens"),
    ({"cu_q": (1, 4, 10)}, "cu_seqlens_q starts at 1; expected 0"),
    ({"cu_q": (0,)}, "cu_seqlens_q ends at 0 but there are 10 tokens"),
    ({"q": torch.zeros(10, 4, 64)[..., :32], "cu_q": (0,)}, "cu_seqlens_q names no document, but there are 10 queries and 10 keys"),
    ({"cu_q": (0, 7, 4, 10)}, "cu_seqlens_q falls from 7 to 4 at index 2"),
    ({"cu_q": torch.tensor([0.0, 10.0])}, r"cu_seqlens_q has dtype torch.float32; expected int32. Remedy: cu_seqlens_q.to\(torch.int32\)"),
    ({"k": (7, 2, 32)}, "q has 10 tokens but k has 7; give cu_seqlens_k"),
    ({"k": (7, 2, 32), "cu_k": (0, 7)}, "cu_seqlens_q has 3 entries but cu_seqlens_k has 2"),
    ({"k": (7, 2, 32), "cu_k": (0, 2, 8)}, "cu_seqlens_k ends at 8 but there are 7 tokens"),
    ({"window_size": (-2, 0)}, r"window_size is \(-2, 0\); expected .*at least -1"),
    ({"softcap": -1.0}, "softcap is -1.0; expected a finite number above 0, or 0"),
    ({"softmax_scale": float("nan")}, "softmax_scale is nan; expected a finite number"),
    ({"max_seqlen_q": 5}, "max_seqlen_q is 5 but the longest document has 6 tokens"),
])  # fmt: skip
def test_messages(wrong, message):
    with pytest.raises(ValueError, match=message):
        call(**wrong)


def test_the_binding_checks_by_itself():
    """The last line of defence, below the public function: no pointer is followed before sizes and offsets make sense."""
    kernels = native.load()
    q, cu = torch.zeros(4, 1, 32), torch.tensor([0, 9], dtype=torch.int32)

    def problem(cu=cu, shape=(4, 1, 32), code=0, threads=1, pointer=None):
        strides = (32, 32, 1)
        pointer = q.data_ptr() if pointer is None else pointer
        return kernels.VarlenProblem(code, pointer, shape, strides, pointer, shape, strides, pointer, strides, cu.data_ptr(), cu.data_ptr(),
                                     len(cu), 1.0, -1, -1, 0.0, threads, code)  # fmt: skip

    good = torch.tensor([0, 4], dtype=torch.int32)
    for match, arguments in {
        "ends at 9 but there are 4 tokens": {},
        "at least one thread": {"cu": good, "threads": 0},
        "multiple of 8": {"cu": good, "shape": (4, 1, 33)},
        "dtype": {"cu": good, "code": 7},
        "null pointer": {"cu": good, "pointer": 0},
        "aligned": {"cu": good, "pointer": q.data_ptr() + 2},
    }.items():
        with pytest.raises(ValueError, match=match):
            problem(**arguments)
    with pytest.raises(ValueError, match="scratch is too small"):
        kernels.varlen_attention_forward(problem(cu=good), *[q.data_ptr()] * 4, q.numel())
