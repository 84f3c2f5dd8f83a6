"""merge_attention beyond its spec: it really merges attentions, empty parts, odd gradients, errors."""

import pytest
import torch
import torch._dynamo.testing

from longvita_kernels import backends, merge_attention, testing

INF = float("inf")


@pytest.fixture(params=("native", "reference"), autouse=True)
def backend(request):
    backends.use(request.param)


def _attention(q, k, v):
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def _parts(tokens=6, heads=3, dim=32, dtype=torch.float32):
    return (
        torch.randn(tokens, heads, dim).to(dtype), torch.randn(heads, tokens),
        torch.randn(tokens, heads, dim).to(dtype), torch.randn(heads, tokens),
    )  # fmt: skip


def test_parts_of_an_attention_merge_to_the_whole_in_any_order():
    q, k, v = torch.randn(5, 2, 32), torch.randn(21, 2, 32), torch.randn(21, 2, 32)
    whole, whole_lse = _attention(q, k, v)
    parts = [_attention(q, k[a:b], v[a:b]) for a, b in ((0, 1), (1, 13), (13, 21))]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        out, lse = parts[order[0]]
        for i in order[1:]:
            out, lse = merge_attention(out, lse, *parts[i])
        torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_a_merge_as_through_the_whole():
    q, k, v = (torch.randn(n, 2, 32, requires_grad=True) for n in (5, 12, 12))
    weights = torch.randn(5, 2, 32), torch.randn(2, 5)

    def gradients(out, lse):
        return torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1]).sum(), (q, k, v))

    whole = gradients(*_attention(q, k, v))
    merged = gradients(*merge_attention(*_attention(q, k[:5], v[:5]), *_attention(q, k[5:], v[5:])))
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_empty_part_changes_no_bit():
    out_a, lse_a, _, _ = _parts()
    nothing = torch.zeros_like(out_a), torch.full_like(lse_a, -INF)
    for got in (merge_attention(out_a, lse_a, *nothing), merge_attention(*nothing, out_a, lse_a)):
        torch.testing.assert_close(got[0], out_a, rtol=0, atol=0)
        torch.testing.assert_close(got[1], lse_a, rtol=0, atol=0)


def test_two_empty_parts_give_nothing_and_no_gradient():
    parts = [torch.zeros(4, 2, 32), torch.full((2, 4), -INF), torch.zeros(4, 2, 32), torch.full((2, 4), -INF)]
    parts = [part.requires_grad_() for part in parts]
    out, lse = merge_attention(*parts)
    assert (out == 0).all() and (lse == -INF).all()
    for grad in torch.autograd.grad([out, lse], parts, [torch.ones_like(out), torch.ones_like(lse)]):
        assert (grad == 0).all()


def test_very_different_weights_do_not_overflow():
    out_a, lse_a, out_b, _ = _parts()
    for shift in (200.0, -200.0, 1e30):
        out, lse = merge_attention(out_a, lse_a, out_b, lse_a + shift)
        expected, expected_lse = (out_b, lse_a + shift) if shift > 0 else (out_a, lse_a)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)


@pytest.mark.parametrize("cotangent", ["expanded scalar", "transposed", "last dimension strided"])
def test_incoming_gradients_may_have_any_strides(cotangent):
    parts = [part.requires_grad_() for part in _parts()]
    out, _ = merge_attention(*parts)
    grad = {
        "expanded scalar": torch.tensor(0.5).expand(out.shape),
        "transposed": torch.randn(3, 6, 32).transpose(0, 1),
        "last dimension strided": torch.randn(6, 3, 64)[..., ::2],
    }[cotangent]
    got = torch.autograd.grad(out, parts, grad, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(out, parts, grad.clone(memory_format=torch.contiguous_format)), strict=True):
        testing.assert_bit_equal(a, b)


def test_changing_one_row_changes_no_bit_of_another():
    parts = _parts(dtype=torch.bfloat16)
    out, lse = merge_attention(*parts)
    parts[0][2] += 1
    parts[1][:, 2] += 1
    again, again_lse = merge_attention(*parts)
    others = [0, 1, 3, 4, 5]
    testing.assert_bit_equal(again[others], out[others])
    testing.assert_bit_equal(again_lse[:, others], lse[:, others])
    assert (again[2] != out[2]).any()


def test_works_in_inference_mode():
    with torch.inference_mode():
        out, lse = merge_attention(*_parts())
    assert out.shape == (6, 3, 32) and lse.shape == (3, 6) and lse.dtype == torch.float32


def test_one_compiled_graph_serves_many_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(merge_attention, fullgraph=True, backend=counter)
    for tokens in (3, 7, 8, 21, 64):
        parts = _parts(tokens)
        for a, b in zip(compiled(*parts), merge_attention(*parts), strict=True):
            testing.assert_bit_equal(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(6, 32)}, r"out_a has shape \(6, 32\); expected \(T, H, D\)"),
        ({2: torch.zeros(6, 3, 40)}, r"out_b has shape \(6, 3, 40\); expected the shape of out_a = \(6, 3, 32\)"),
        ({1: torch.zeros(6, 3)}, r"lse_a has shape \(6, 3\); expected \(H, T\) = \(3, 6\)"),
        ({3: torch.zeros(3, 6, dtype=torch.bfloat16)}, r"lse_b has dtype bfloat16; expected one of float32. Cast it"),
        ({2: torch.zeros(6, 3, 32, dtype=torch.bfloat16)}, r"out_b has dtype torch.bfloat16 but out_a has torch.float32"),
        ({0: torch.zeros(6, 3, 32, dtype=torch.int32)}, r"out_a has dtype int32; expected one of float32, bfloat16, float16"),
        ({0: torch.zeros(6, 3, 64)[..., ::2]}, r"out_a has stride 2 in its last dimension; expected 1. Remedy: out_a.contiguous\(\)"),
        ({3: torch.zeros(3, 6, device="meta")}, r"lse_b is on meta but out_a is on cpu"),
    ],
)
def test_wrong_arguments_are_explained(change, message):
    parts = list(_parts())
    for index, value in change.items():
        parts[index] = value
    with pytest.raises(ValueError, match=message):
        merge_attention(*parts)
