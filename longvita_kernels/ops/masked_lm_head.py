"""Logits of the rows that somebody reads, and of no others.

    logits[m, v] = Σ_h hidden[rows[m], h] · weight[v, h]

(T, H): hidden, one row per token. (V, H): weight. (M,): rows. (M, V): logits. The gathered rows are never copied: the kernel reads them
through the index. Cost follows M, forward and backward; only the zeros of d hidden cost T. Gradients, where row t was asked for by
the set m(t) of positions:

    d hidden[t] = Σ_{m ∈ m(t)} Σ_v g[m, v] · weight[v]        d weight[v] = Σ_m g[m, v] · hidden[rows[m]]

Source: the logits-masked language-model head of Long-VITA (arXiv 2502.05177), which makes its 1M-token prefill fit.
"""

import torch

from longvita_kernels import backends, native
from longvita_kernels.ops import _common, _gemm
from longvita_kernels.ops._products import product
from longvita_kernels.spec import OpSpec, SampleInput, nbytes


def reference(hidden, weight, rows):
    """The definition in plain torch, float32 inside (float64 for float64)."""
    dtype = _common.compute_dtype(hidden)
    return (hidden[rows].to(dtype) @ weight.to(dtype).T).to(hidden.dtype)


def base(hidden, weight, rows):
    """The plain composition in the inputs' own dtype."""
    return torch.nn.functional.linear(hidden[rows], weight)


def masked_lm_head(hidden, weight, rows):
    """Logits of selected rows: `hidden[rows] @ weight.T`, with a cost that follows the number of rows.

    hidden (T, H)  float32, bfloat16 or float16; last dimension dense, rows may be strided
    weight (V, H)  same dtype; rows may be strided
    rows           int64 (M,), in any order, repeats allowed; or bool (T,), True where logits are wanted (synchronises on a GPU)
    → logits (M, V) in hidden's dtype, accumulated in float32. hidden and weight take gradients; one that is frozen costs nothing.

    Memory beside inputs and outputs: about 7.7 MiB a thread, kept for the next call; backward, when hidden takes a gradient, M × H float32
    and T int64. Autocast casts hidden and weight like `linear`. Raises ValueError for shapes, dtypes, devices or strides that do not fit
    and, on the CPU, for a row outside 0 … T−1.
    """
    hidden, weight = _common.autocast_tensors(hidden, weight)
    _common.check_shape("hidden", hidden, (None, None), "(T, H)")
    _common.check_shape("weight", weight, (None, hidden.shape[1]), "(V, H)")
    _common.check_float("hidden", hidden)
    _common.check_like("weight", weight, "hidden", hidden)
    _common.check_last_stride("hidden", hidden)
    _common.check_last_stride("weight", weight)
    _common.check_tensor("rows", rows, "int64")
    _common.check_dtype("rows", rows, (torch.int64, torch.bool))
    _common.check_device("rows", rows, "hidden", hidden)
    if rows.dtype == torch.bool:
        _common.check_shape("rows", rows, (hidden.shape[0],), "(T,) as bool")
        rows = rows.nonzero().squeeze(1)
    _common.check_shape("rows", rows, (None,), "(M,)")
    return _common.call(_lm_head, _forward_impl, (hidden, weight, rows))


# ------------------------------------------------------------------------------------------------------------------------------ flat ops


def cuda_cannot(*, hidden, **_):
    """Why the CUDA C++ kernel cannot take a call with these arguments, or None."""
    fits = hidden.shape[-1] * hidden.element_size() <= _CUDA_ROW_BYTES
    return None if fits else f"the CUDA kernel keeps a row of hidden in shared memory: {_CUDA_ROW_BYTES} bytes at most"


_CUDA_ROW_BYTES = 96 << 10  # an SM of compute capability 8.6 to 12.0 gives a block 99 KiB at least


def check_rows(rows, tokens):
    """Row numbers must lie in 0 … tokens−1; names the first that does not. Inside a flat op, never while tracing."""
    if not _common.checks_values(rows) or rows.numel() == 0:
        return
    bad = (rows < 0) | (rows >= tokens)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"rows[{at}] is {int(rows[at])}; expected 0 … {tokens - 1}, because hidden has {tokens} rows. Remedy: count rows from the "
            "start of hidden (negative numbers do not count from the end)"
        )


def _on_gpu(backend):
    if backend == "cuda":
        from longvita_kernels.cuda import masked_lm_head
    else:
        from longvita_kernels.triton import masked_lm_head
    return masked_lm_head


def _torch_forward(hidden, weight, rows):
    if hidden.shape[0] == 0:
        return hidden.new_zeros(rows.shape[0], weight.shape[0])
    return base(hidden, weight, rows.clamp(0, hidden.shape[0] - 1))  # nobody may look at rows on a GPU


def _torch_backward(grad, hidden, weight, rows, needs):
    """Two products at their own speed; what rows asked for several times get is added up in float32, and no T × H of that exists."""
    grad_hidden, grad_weight = (torch.zeros_like(x) if need else _common.absent(x) for x, need in zip((hidden, weight), needs, strict=True))
    if hidden.shape[0] == 0 or rows.shape[0] == 0:
        return grad_hidden, grad_weight
    rows = rows.clamp(0, hidden.shape[0] - 1)
    if needs[0]:
        ordered, order = rows.sort(stable=True)
        starts = torch.ones_like(ordered)
        starts[1:] = ordered.diff() != 0
        group_M = torch.empty_like(rows).index_copy_(0, order, starts.cumsum(0) - 1)  # the same number for equal rows
        sums = torch.zeros(rows.shape[0], hidden.shape[1], dtype=_common.compute_dtype(hidden), device=hidden.device)
        sums.index_put_((group_M,), product(grad, weight), accumulate=True)  # sorts: the order of sums is the same in every run
        grad_hidden.index_put_((rows,), sums[group_M].to(hidden.dtype))
    if needs[1]:
        torch.mm(grad.T, hidden[rows], out=grad_weight)
    return grad_hidden, grad_weight


def _native_arguments(hidden, weight, rows, scratch):
    return (
        native.dtype_code(hidden.dtype), *hidden.shape, weight.shape[0], rows.shape[0],
        hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0), rows.data_ptr(),
        scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _forward_impl(hidden, weight, rows):
    backend = backends.choose("masked_lm_head", hidden, None, lambda: cuda_cannot(hidden=hidden))
    if backend != "native":
        check_rows(rows, hidden.shape[0])  # the native kernel does so itself
    if backend in ("reference", "torch"):
        return _common.run_reference(reference if backend == "reference" else _torch_forward, hidden, weight, rows)
    if backend != "native":
        return _on_gpu(backend).forward(hidden, weight, rows)
    logits, rows, module = _forward_fake(hidden, weight, rows), rows.contiguous(), native.load()
    gathered = torch.empty(4 * (-(-hidden.shape[1] // 16) * 16), dtype=torch.float32)
    thin = rows.shape[0] <= module.masked_lm_head_thin_rows()  # the kernel of few rows needs no scratch
    scratch = gathered if thin else _gemm.take(_gemm.scratch_floats())
    module.masked_lm_head_forward(*_native_arguments(hidden, weight, rows, scratch), logits.data_ptr(), gathered.data_ptr())
    if not thin:
        _gemm.give_back(scratch)
    return logits


def _forward_fake(hidden, weight, rows):
    return hidden.new_empty(rows.shape[0], weight.shape[0])


def _backward_impl(grad, hidden, weight, rows, needs):
    backend = backends.choose("masked_lm_head", hidden, None, lambda: cuda_cannot(hidden=hidden))
    if backend == "reference":
        return _common.reference_gradients(lambda h, w: reference(h, w, rows), (hidden, weight), needs, (grad,))
    if backend == "torch":
        return _common.run_reference(_torch_backward, grad, hidden, weight, rows, needs)
    if backend != "native":
        return _on_gpu(backend).backward(grad, hidden, weight, rows, needs)
    grad, rows, scratch = _gemm.dense_rows(grad), rows.contiguous(), _gemm.take(_gemm.scratch_floats())
    tokens, width = hidden.shape
    grad_hidden = hidden.new_zeros(tokens, width) if needs[0] else _common.absent(hidden)
    grad_weight = weight.new_empty(weight.shape) if needs[1] else _common.absent(weight)
    grad_rows = torch.empty(rows.shape[0] if needs[0] else 0, width, dtype=torch.float32)
    owner = torch.empty(tokens if needs[0] else 0, dtype=torch.int64)
    native.load().masked_lm_head_backward(
        *_native_arguments(hidden, weight, rows, scratch), grad.data_ptr(), grad.stride(0),
        grad_hidden.data_ptr(), grad_rows.data_ptr(), owner.data_ptr(), grad_weight.data_ptr(),
    )  # fmt: skip
    _gemm.give_back(scratch)
    return grad_hidden, grad_weight


def _backward_fake(grad, hidden, weight, rows, needs):
    return tuple(x.new_empty(x.shape) if need else _common.absent(x) for x, need in zip((hidden, weight), needs, strict=True))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:2])
    grads = _common.call(_lm_head_backward, _backward_impl, (grad, *ctx.saved_tensors), needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


_lm_head_backward = _common.define_op(
    "masked_lm_head_backward", "(Tensor grad, Tensor hidden, Tensor weight, Tensor rows, bool[2] needs) -> (Tensor, Tensor)",
    _backward_impl, _backward_fake,
)  # fmt: skip
_lm_head = _common.define_op(
    "masked_lm_head", "(Tensor hidden, Tensor weight, Tensor rows) -> Tensor",
    _forward_impl, _forward_fake, backward=_backward, setup_context=_setup_context,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------------------- spec


def _samples(dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(rows, width, strided=False):
        values = torch.randn(rows, width + (5 if strided else 0), generator=generator).to(device, dtype)
        return values[:, :width]

    def make(label, tokens, width, vocab, rows, strided=False):
        rows = rows if isinstance(rows, torch.Tensor) else torch.randint(max(tokens, 1), (rows,), generator=generator)
        args = (normal(tokens, width, strided), normal(vocab, width, strided) / max(width, 1) ** 0.5, rows.to(device))
        return SampleInput(label, args, {}, ("hidden", "weight"))

    yield make("repeated rows", 23, 48, 67, 31)
    yield make("primes, strided views", 41, 37, 101, 13, strided=True)
    yield make("several blocks of each size", 230, 300, 290, 211)
    yield make("bool rows", 29, 32, 53, torch.rand(29, generator=generator) < 0.3)
    yield make("three rows", 17, 53, 71, 3)
    yield make("one row, one token", 1, 19, 83, 1)
    yield make("no rows", 7, 16, 11, 0)
    yield make("no tokens", 0, 16, 11, torch.zeros(0, dtype=torch.int64))


def _count(sample):
    rows = sample.args[2]
    return int(rows.sum()) if rows.dtype == torch.bool else rows.numel()


def _bytes(sample):
    hidden, weight, rows = sample.args
    return nbytes(weight, rows) + _count(sample) * (hidden.shape[1] + weight.shape[0]) * hidden.element_size()


def _flops(sample):
    return 2 * _count(sample) * sample.args[1].numel()


def _flat_calls(sample):
    hidden, weight, rows = sample.args
    if rows.dtype == torch.bool:
        return
    yield _lm_head, (hidden, weight, rows)
    grad = torch.ones(rows.shape[0], weight.shape[0], dtype=hidden.dtype)
    for needs in ([True, True], [False, True], [True, False]):
        yield _lm_head_backward, (grad, hidden, weight, rows, needs)


SPEC = OpSpec(
    name="masked_lm_head", op=masked_lm_head, reference=reference, base=base, samples=_samples, outputs=("logits",),
    autocast=("hidden", "weight"),
    bytes=_bytes, flops=_flops, flat_calls=_flat_calls,
)  # fmt: skip
