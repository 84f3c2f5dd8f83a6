"""Exact combination of two partial attentions over disjoint keys.

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a − lse) · out_a + exp(lse_b − lse) · out_b

(H, T): lse. (T, H, D): out. T tokens, H query heads, D head dimension. A row that saw nothing has lse = −inf and weight 0; where both saw
nothing the result is out = 0, lse = −inf and all gradients are 0. The out of a row that saw nothing is not read. With weights w_a, w_b and
incoming gradients g (of out), g_lse:

    d out_a = w_a · g        d lse_a = w_a · (g · (out_a − out) + g_lse)        and the same for b

Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; the merge step of FlashAttention-2 and ring attention.
"""

import torch

from longvita_kernels import backends, native
from longvita_kernels.ops import _common
from longvita_kernels.spec import OpSpec, SampleInput, nbytes


def reference(out_a, lse_a, out_b, lse_b):
    """The definition in plain torch, float32 inside (float64 for float64)."""
    dtype = _common.compute_dtype(out_a)
    return _compose(out_a.to(dtype), lse_a.to(dtype), out_b.to(dtype), lse_b.to(dtype), out_a.dtype, lse_a.dtype)


def base(out_a, lse_a, out_b, lse_b):
    """The plain composition in the inputs' own dtype."""
    return _compose(out_a, lse_a, out_b, lse_b, out_a.dtype, lse_a.dtype)


def _compose(out_a_THD, lse_a_HT, out_b_THD, lse_b_HT, out_dtype, lse_dtype):
    out_a_THD, out_b_THD = (
        out.masked_fill((lse == float("-inf")).T.unsqueeze(-1), 0.0) for out, lse in ((out_a_THD, lse_a_HT), (out_b_THD, lse_b_HT))
    )
    nothing_HT = torch.maximum(lse_a_HT, lse_b_HT) == float("-inf")
    # logaddexp of two −inf has a NaN gradient, so those rows compute with 0 and are masked at the end
    a_HT, b_HT = lse_a_HT.masked_fill(nothing_HT, 0.0), lse_b_HT.masked_fill(nothing_HT, 0.0)
    lse_HT = torch.logaddexp(a_HT, b_HT)
    seen_TH1 = (~nothing_HT).T.unsqueeze(-1)
    weight_a, weight_b = ((x_HT - lse_HT).exp().T.unsqueeze(-1).to(out_a_THD.dtype) * seen_TH1 for x_HT in (a_HT, b_HT))
    out_THD = weight_a * out_a_THD + weight_b * out_b_THD
    return out_THD.to(out_dtype), lse_HT.masked_fill(nothing_HT, float("-inf")).to(lse_dtype)


def merge_attention(out_a, lse_a, out_b, lse_b):
    """Combine two partial attentions of the same queries over disjoint sets of keys, exactly; float32 inside.

    out_a, out_b (T, H, D)  same dtype: float32, bfloat16 or float16; last dimension dense, other strides free
    lse_a, lse_b (H, T)     float32, natural logarithm; −inf for a row that saw nothing
    → out (T, H, D) in out_a's dtype, lse (H, T) float32. All four inputs take gradients. Autocast leaves the dtypes alone: partial
    results are kept as precise as they come. Raises ValueError for shapes, dtypes, devices or strides that do not fit.
    """
    _check(out_a, lse_a, out_b, lse_b)
    return _common.call(_merge, _forward_impl, (out_a, lse_a, out_b, lse_b))


def _check(out_a, lse_a, out_b, lse_b):
    _common.check_shape("out_a", out_a, (None, None, None), "(T, H, D)")
    _common.check_shape("out_b", out_b, out_a.shape, "the shape of out_a")
    _common.check_float("out_a", out_a)
    _common.check_like("out_b", out_b, "out_a", out_a)
    tokens, heads, _ = out_a.shape
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _common.check_shape(name, lse, (heads, tokens), "(H, T)")
        _common.check_dtype(name, lse, (torch.float64,) if out_a.dtype == torch.float64 else (torch.float32,))
        _common.check_device(name, lse, "out_a", out_a)
    _common.check_last_stride("out_a", out_a)
    _common.check_last_stride("out_b", out_b)


# ------------------------------------------------------------------------------------------------------------------------------ flat ops


def _on_gpu(backend):
    if backend == "cuda":
        from longvita_kernels.cuda import merge_attention
    else:
        from longvita_kernels.triton import merge_attention
    return merge_attention


def _torch_weights(lse_a, lse_b):
    """lse, both weights (T, H, 1), and where each part saw nothing."""
    ahead = lse_a - lse_b  # NaN where both saw nothing
    blind = [(x == -torch.inf).T.unsqueeze(-1) for x in (lse_a, lse_b)]
    return torch.logaddexp(lse_a, lse_b), [x.sigmoid().nan_to_num(0.0).T.unsqueeze(-1) for x in (ahead, -ahead)], blind


def _torch_forward(out_a, lse_a, out_b, lse_b):
    """A few passes over what is large; torch widens 16 bits inside the kernels."""
    lse, weights, blind = _torch_weights(lse_a, lse_b)
    a, b = ((weight * out).masked_fill_(nothing, 0.0) for weight, out, nothing in zip(weights, (out_a, out_b), blind, strict=True))
    return a.add_(b).to(out_a.dtype), lse


def _torch_backward(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, needs):
    """The equations of this module: nothing is differentiated, nothing saved."""
    lse, weights, blind = _torch_weights(lse_a, lse_b)
    grad_out = torch.zeros_like(out_a) if grad_out is None else grad_out
    shares = [
        (weight * grad_out).masked_fill_(nothing, 0.0).to(out_a.dtype) if need else _common.absent(out_a)
        for weight, nothing, need in zip(weights, blind, needs[::2], strict=True)
    ]
    if not needs[1] and not needs[3]:
        return shares[0], _common.absent(lse), shares[1], _common.absent(lse)
    dots = [
        (grad_out.to(lse.dtype) * out).sum(-1, keepdim=True).masked_fill_(nothing, 0.0)
        for out, nothing in zip((out_a, out_b), blind, strict=True)
    ]
    both = weights[0] * dots[0] + weights[1] * dots[1]
    from_lse = 0.0 if grad_lse is None else grad_lse.T.unsqueeze(-1)
    of_lse = [
        (weight * (dot - both + from_lse)).masked_fill_(nothing, 0.0).squeeze(-1).T
        for weight, dot, nothing in zip(weights, dots, blind, strict=True)
    ]
    return shares[0], of_lse[0] if needs[1] else _common.absent(lse), shares[1], of_lse[1] if needs[3] else _common.absent(lse)


def _forward_impl(out_a, lse_a, out_b, lse_b):
    backend = backends.choose("merge_attention", out_a)
    if backend in ("reference", "torch"):
        return _common.run_reference(reference if backend == "reference" else _torch_forward, out_a, lse_a, out_b, lse_b)
    out, lse = _forward_fake(out_a, lse_a, out_b, lse_b)
    if backend != "native":
        _on_gpu(backend).forward(out_a, lse_a, out_b, lse_b, out, lse)
        return out, lse
    tokens, heads, dim = out_a.shape
    native.load().merge_attention_forward(
        native.dtype_code(out_a.dtype), (tokens, heads, dim),
        out_a.data_ptr(), out_a.stride()[:2], lse_a.data_ptr(), lse_a.stride(),
        out_b.data_ptr(), out_b.stride()[:2], lse_b.data_ptr(), lse_b.stride(),
        out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def _forward_fake(out_a, lse_a, out_b, lse_b):
    return _common.dense_like(out_a), _common.dense_like(lse_a)


def _backward_impl(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, needs):
    inputs = (out_a, lse_a, out_b, lse_b)
    backend = backends.choose("merge_attention", out_a)
    if backend == "reference":
        return _common.reference_gradients(reference, inputs, needs, (grad_out, grad_lse))
    if backend == "torch":
        return _common.run_reference(_torch_backward, grad_out, grad_lse, *inputs, needs)
    grads = _backward_fake(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, needs)
    tokens, heads, dim = out_a.shape
    grad_out = grad_out if grad_out is None or grad_out.stride(-1) == 1 else grad_out.contiguous()
    if backend != "native":
        _on_gpu(backend).backward(grad_out, grad_lse, *inputs, [grad if need else None for grad, need in zip(grads, needs, strict=True)])
        return grads
    native.load().merge_attention_backward(
        native.dtype_code(out_a.dtype), (tokens, heads, dim),
        out_a.data_ptr(), out_a.stride()[:2], lse_a.data_ptr(), lse_a.stride(),
        out_b.data_ptr(), out_b.stride()[:2], lse_b.data_ptr(), lse_b.stride(),
        *_common.pointer_and_strides(grad_out, 2), *_common.pointer_and_strides(grad_lse, 2),
        [grad.data_ptr() if need else 0 for grad, need in zip(grads, needs, strict=True)], torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _backward_fake(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, needs):
    inputs = (out_a, lse_a, out_b, lse_b)
    return tuple(x.new_empty(x.shape) if need else _common.absent(x) for x, need in zip(inputs, needs, strict=True))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # an unused output costs nothing: its gradient arrives as None
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out, grad_lse):
    needs = list(ctx.needs_input_grad)
    grads = _common.call(_merge_backward, _backward_impl, (grad_out, grad_lse, *ctx.saved_tensors), needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


_INPUTS = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"
_merge_backward = _common.define_op(
    "merge_attention_backward",
    f"(Tensor? grad_out, Tensor? grad_lse, {_INPUTS}, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl, _backward_fake,
)  # fmt: skip
_merge = _common.define_op(
    "merge_attention", f"({_INPUTS}) -> (Tensor, Tensor)", _forward_impl, _forward_fake, backward=_backward, setup_context=_setup_context
)

# ---------------------------------------------------------------------------------------------------------------------------------- spec


def _samples(dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)

    def make(label, tokens, heads, dim, *, empty_a=0, empty_b=0, unread=0.0, strided=False):
        width = 2 * dim if strided else dim
        outs = [torch.randn(tokens, heads, width, generator=generator).to(device, dtype)[..., :dim] for _ in "ab"]
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (tokens, heads) if strided else (heads, tokens)
        lses = [3 * torch.randn(shape, generator=generator).to(device, lse_dtype) for _ in "ab"]
        lses = [lse.T if strided else lse for lse in lses]
        for out, lse, rows in zip(outs, lses, (empty_a, empty_b), strict=True):
            out[:rows], lse[:, :rows] = unread, float("-inf")
        return SampleInput(label, (outs[0], lses[0], outs[1], lses[1]), {}, ("out_a", "lse_a", "out_b", "lse_b"))

    yield make("plain", 17, 4, 64)
    yield make("strided views, D 40", 13, 5, 40, strided=True)
    yield make("rows without keys", 11, 2, 32, empty_a=5, empty_b=3)
    yield make("rows without keys that hold NaN", 11, 2, 40, empty_a=5, empty_b=3, unread=float("nan"))
    yield make("one token, one head, D 256", 1, 1, 256)
    yield make("no tokens", 0, 3, 32)


def _bytes(sample):
    out_a, lse_a, out_b, lse_b = sample.args
    return nbytes(out_a, lse_a, out_b, lse_b) + nbytes(out_a, lse_a)


def _flops(sample):
    return 3 * sample.args[0].numel() + 6 * sample.args[1].numel()


def _flat_calls(sample):
    out_a, lse_a, out_b, lse_b = sample.args
    yield _merge, (out_a, lse_a, out_b, lse_b)
    yield _merge_backward, (torch.ones_like(out_a), torch.ones_like(lse_a), out_a, lse_a, out_b, lse_b, [True] * 4)
    yield _merge_backward, (torch.ones_like(out_a), None, out_a, lse_a, out_b, lse_b, [True, False, False, True])


SPEC = OpSpec(
    name="merge_attention", op=merge_attention, reference=reference, base=base, samples=_samples, outputs=("out", "lse"),
    bytes=_bytes, flops=_flops, flat_calls=_flat_calls,
)  # fmt: skip
