"""Pixel shuffle, LayerNorm and the two-layer projector from vision features to language-model embeddings, as one op.

    s[n, i, j, (dr·2 + dc)·C + c] = x[n, 2i + dr, 2j + dc, c]               four patches become one token of 4C channels
    z = LayerNorm(s; ln_weight, ln_bias, eps) · w1ᵀ + b1        y = GELU(z) · w2ᵀ + b2        GELU(z) = z · Φ(z), exact

(N, L, C): x, N tiles of L patches, the class token (skipped) first where there is one. (N, R, ·): tokens, R = rows/2 · cols/2.
D: width of z. O: width of y. A token is two runs of 2C channels in x, so neither the shuffled nor the normalised matrix is ever made:
the first matmul reads the runs where they stand and normalises them on the way, forward and backward.

Source: InternVL's pixel shuffle (arXiv 2404.16821) as in Long-VITA (arXiv 2502.05177), whose two linear layers have no biases.
"""

import math

import torch
import torch.nn.functional as F

from longvita_kernels import backends, native
from longvita_kernels.ops import _common, _gemm, _projector_path
from longvita_kernels.spec import OpSpec, SampleInput, nbytes


def reference(x, ln_weight, ln_bias, w1, w2, *, b1=None, b2=None, grid=(32, 32), class_token=True, eps=1e-5):
    """The definition in plain torch, float32 inside (float64 for float64)."""
    dtype = _common.compute_dtype(x)
    return _compose(dtype, x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token, eps).to(x.dtype)


def base(x, ln_weight, ln_bias, w1, w2, *, b1=None, b2=None, grid=(32, 32), class_token=True, eps=1e-5):
    """The plain composition in the inputs' own dtype."""
    return _compose(x.dtype, x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token, eps)


def _compose(dtype, x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token, eps):
    x, ln_weight, ln_bias, w1, b1, w2, b2 = (None if t is None else t.to(dtype) for t in (x, ln_weight, ln_bias, w1, b1, w2, b2))
    patches_NLC = x[:, 1:] if class_token else x
    (tiles, _, channels), rows, cols = patches_NLC.shape, grid[0] // 2, grid[1] // 2
    corners = patches_NLC.reshape(tiles, rows, 2, cols, 2, channels).permute(0, 1, 3, 2, 4, 5)
    normed = F.layer_norm(corners.reshape(tiles, rows * cols, 4 * channels), (4 * channels,), ln_weight, ln_bias, eps)
    return F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2)


def pixel_shuffle_projection(x, ln_weight, ln_bias, w1, w2, *, b1=None, b2=None, grid=(32, 32), class_token=True, eps=1e-5):
    """Project the patches of N tiles to N × (rows/2 · cols/2) tokens.

    x (N, rows·cols [+ 1], C)   float32, bfloat16 or float16; last dimension dense, tiles and patches may be strided
    ln_weight, ln_bias (4C,)    same dtype, or float32
    w1 (D, 4C), w2 (O, D)       same dtype as x; optional b1 (D,), b2 (O,)
    grid                        (rows, cols) of patches, both even; class_token: x[:, 0] is one, and is skipped
    → (N, rows/2 · cols/2, O) in x's dtype. All seven tensors take gradients; those that are frozen skip their part of the work.

    Statistics, sums and GELU are in float32. Memory beside inputs and outputs: GELU(z), and z if a gradient may follow, (tokens, D) each;
    backward one (tokens, D), and a tensor like x if x is frozen but LayerNorm is not; and, kept for
    the next call, 7.7 MiB and two tokens of floats a thread.
    Autocast casts x, weights and biases like `linear`, and leaves ln_weight and ln_bias.
    Raises ValueError for shapes, dtypes, devices or strides that do not fit.
    """
    x, w1, b1, w2, b2 = _common.autocast_tensors(x, w1, b1, w2, b2)
    eps = 1e-5 if eps is None else eps
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}; expected a finite number of at least 0, or None for 1e-5")
    _check(x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token)
    tensors = (x, ln_weight, ln_bias, w1, b1, w2, b2)
    if _common.is_direct(_project, tensors):  # no gradient follows
        return _forward_impl(*tensors, grid, class_token, eps, False, only_out=True)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return _common.call(_project, _forward_impl, tensors, list(grid), class_token, eps, save)[0]


def _check(x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token):
    if len(grid) != 2 or any(not isinstance(size, _common.INTEGERS) or size <= 0 or size % 2 for size in grid):
        raise ValueError(f"grid is {tuple(grid)}; expected (rows, cols) of patches, two even ints above 0: 2 × 2 of them make a token")
    shape, w1_shape, w2_shape = x.shape, w1.shape, w2.shape
    length, width, hidden = grid[0] * grid[1] + int(class_token), 4 * shape[-1], w1_shape[0]
    if (  # what follows would find nothing; in one call instead of a dozen
        b1 is None and b2 is None and _common.common_case(x, w1, w2, ln_weight, ln_bias) and len(shape) == 3 and shape[1] == length
        and w1_shape == (hidden, width) and w2_shape == (w2_shape[0], hidden) and ln_weight.shape == (width,) == ln_bias.shape
    ):  # fmt: skip
        return
    legend = f"(N, rows·cols{' + 1' if class_token else ''}, C)"
    if x.ndim == 3 and x.shape[1] == grid[0] * grid[1] + 1 - int(class_token):
        remedy = "pass class_token=False, or prepend the class token" if class_token else "pass class_token=True, or drop the first row"
        raise ValueError(
            f"x has {x.shape[1]} rows per tile; expected {length} for grid {tuple(grid)} with class_token={class_token}. Remedy: {remedy}"
        )
    _common.check_shape("x", x, (None, length, None), legend)
    _common.check_float("x", x)
    _common.check_last_stride("x", x)
    for name, tensor in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        _common.check_shape(name, tensor, (width,), "(4C,)")
        _common.check_dtype(name, tensor, (x.dtype, torch.float32))
        _common.check_device(name, tensor, "x", x)
    _check_linear("w1", w1, (None, width), "(D, 4C)", x)
    _check_linear("b1", b1, (hidden,), "(D,)", x)
    _check_linear("w2", w2, (None, hidden), "(O, D)", x)
    _check_linear("b2", b2, (w2.shape[0],), "(O,)", x)


def _check_linear(name, tensor, shape, legend, x):
    if tensor is None:
        return
    _common.check_shape(name, tensor, shape, legend)
    _common.check_like(name, tensor, "x", x)
    _common.check_last_stride(name, tensor)


# ------------------------------------------------------------------------------------------------------------------------------ flat ops


_MAX_CHANNELS = 16384  # one token of 4C floats has to fit into the scratch of the native matrix product


def native_cannot(*, x=None, **_):
    """Why the native kernel cannot take a call with these arguments, or None."""
    return None if x is None or 0 < x.shape[2] <= _MAX_CHANNELS else f"the native kernel takes 1 to {_MAX_CHANNELS} channels only"


def _backend(x):
    return backends.choose("pixel_shuffle_projection", x, native_cannot(x=x))


def _triton():
    from longvita_kernels.triton import pixel_shuffle_projection

    return pixel_shuffle_projection


def _sizes(x, w1, w2, grid):
    """(N, rows, cols, C, D, O) and the number of tokens."""
    tiles, _, channels = x.shape
    return (tiles, *grid, channels, w1.shape[0], w2.shape[0]), tiles * (grid[0] // 2) * (grid[1] // 2)


def _native_arguments(x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token, eps, stats, z):
    """(what forward and backward share, what it points to and must live as long). stats and z are addresses; 0: nobody keeps them."""
    module, threads, (tile, patch, _), (tiles, _, channels) = native.load(), torch.get_num_threads(), x.stride(), x.shape
    dtype, sizes = native.dtype_code(x.dtype), (tiles, *grid, channels, w1.shape[0], w2.shape[0])
    workspace = _gemm.take(module.pixel_shuffle_projection_workspace(dtype, sizes, threads))
    ln_weight, ln_bias, b1, b2 = vectors = _vector(ln_weight), _vector(ln_bias), _vector(b1), _vector(b2)
    first = x.data_ptr() + (patch * x.element_size() if class_token and tiles else 0)
    return (
        dtype, sizes, first, (tile, patch), ln_weight.data_ptr(), ln_bias.data_ptr(), w1.data_ptr(), w1.stride()[0],
        0 if b1 is None else b1.data_ptr(), w2.data_ptr(), w2.stride()[0], 0 if b2 is None else b2.data_ptr(),
        eps, stats, z, workspace.data_ptr(), threads,
    ), (vectors, workspace)  # fmt: skip


def _vector(tensor):
    """As the kernel reads it: float32, dense; None stays None."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    tensor = _common.plain(tensor)
    return (tensor if tensor.dtype == torch.float32 else tensor.to(torch.float32)).contiguous()


def _forward_impl(x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token, eps, save, *, only_out=False):
    """y, z and the statistics; `only_out`: just y (not for the dispatcher), with the statistics in the scratch."""
    inputs = (x, ln_weight, ln_bias, w1, b1, w2, b2)
    backend = _backend(x)
    if backend == "triton":
        outputs = _triton().forward(*inputs, grid, class_token, eps, save)
        return outputs[0] if only_out else outputs
    native_runs = backend == "native"
    if native_runs and only_out:
        y = x.new_empty(x.shape[0], (grid[0] // 2) * (grid[1] // 2), w2.shape[0])
        arguments, alive = _native_arguments(*inputs, grid, class_token, eps, 0, 0)
        native.load().pixel_shuffle_projection_forward(*arguments, y.data_ptr())
        _gemm.give_back(alive[1])
        return y
    y, z, stats = _forward_fake(*inputs, grid, class_token, eps, save)
    if backend == "torch":
        y, z_all = _common.run_reference(_projector_path.forward, *inputs, grid, class_token, eps)
        return y if only_out else (y, z_all if save else z, stats.zero_())  # its backward makes the statistics again
    if not native_runs:
        y = _common.run_reference(reference, x, ln_weight, ln_bias, w1, w2, b1=b1, b2=b2, grid=grid, class_token=class_token, eps=eps)
        return y if only_out else (y, z.zero_(), stats.zero_())  # its backward runs the definition again and reads neither
    arguments, alive = _native_arguments(*inputs, grid, class_token, eps, stats.data_ptr(), z.data_ptr())
    native.load().pixel_shuffle_projection_forward(*arguments, y.data_ptr())
    _gemm.give_back(alive[1])
    return y, z, stats


def _forward_fake(x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token, eps, save):
    _, tokens = _sizes(x, w1, w2, grid)
    y = x.new_empty(x.shape[0], (grid[0] // 2) * (grid[1] // 2), w2.shape[0])
    return y, x.new_empty(tokens if save else 0, w1.shape[0]), x.new_empty(2, tokens, dtype=torch.float32)


def _backward_impl(grad, x, ln_weight, ln_bias, w1, b1, w2, b2, z, stats, grid, class_token, eps, needs):
    inputs = (x, ln_weight, ln_bias, w1, b1, w2, b2)
    backend = _backend(x)
    if backend == "triton":
        return _triton().backward(grad, *inputs, z, stats, grid, class_token, eps, needs)
    if backend == "torch":
        return _common.run_reference(_projector_path.backward, grad, *inputs, z, grid, class_token, eps, needs)
    if backend == "reference":

        def definition(x, ln_weight, ln_bias, w1, b1, w2, b2):
            return reference(x, ln_weight, ln_bias, w1, w2, b1=b1, b2=b2, grid=grid, class_token=class_token, eps=eps)

        return _common.reference_gradients(definition, inputs, needs, (grad,))
    module = native.load()
    (_, _, _, channels, hidden, _), tokens = _sizes(x, w1, w2, grid)
    need_x, need_lw, need_lb, need_w1, need_b1, need_w2, need_b2 = needs
    grad = grad.reshape(tokens, w2.shape[0])
    grad = _gemm.dense_rows(grad)
    vector = [torch.empty(size if need else 0, dtype=torch.float32) for size, need in (
        (4 * channels, need_lw or need_lb), (4 * channels, need_lw or need_lb), (hidden, need_b1), (w2.shape[0], need_b2))]  # fmt: skip
    out_w1, out_w2 = (t.new_empty(t.shape) if need else _common.absent(x) for t, need in ((w1, need_w1), (w2, need_w2)))
    out_x = x.new_empty(x.shape) if need_x or need_lw or need_lb else _common.absent(x)  # LayerNorm is differentiated in its place
    patches = out_x[:, 1:] if out_x.numel() and class_token else out_x
    if need_x and class_token:
        out_x[:, 0].zero_()
    blocks = -(-tokens // module.pixel_shuffle_projection_block_rows())
    partial = torch.empty(max(blocks, 1) if need_lw or need_lb else 0, 2, 4 * channels, dtype=torch.float32)
    arguments, alive = _native_arguments(*inputs, grid, class_token, eps, stats.data_ptr(), z.data_ptr())
    module.pixel_shuffle_projection_backward(
        *arguments, grad.data_ptr(), grad.stride(0), need_x, partial.data_ptr(), patches.stride()[:2] if patches.numel() else (0, 0),
        (patches.data_ptr(), vector[0].data_ptr(), vector[1].data_ptr(), out_w1.data_ptr(), vector[2].data_ptr(),
         out_w2.data_ptr(), vector[3].data_ptr()),
    )  # fmt: skip
    _gemm.give_back(alive[1])
    cast = [v.to(t.dtype) if need else _common.absent(x) for v, t, need in zip(
        vector, (ln_weight, ln_bias, b1, b2), (need_lw, need_lb, need_b1, need_b2), strict=True)]  # fmt: skip
    return out_x if need_x else _common.absent(x), cast[0], cast[1], out_w1, cast[2], out_w2, cast[3]


def _backward_fake(grad, x, ln_weight, ln_bias, w1, b1, w2, b2, z, stats, grid, class_token, eps, needs):
    inputs = (x, ln_weight, ln_bias, w1, b1, w2, b2)
    return tuple(t.new_empty(t.shape) if need else _common.absent(x) for t, need in zip(inputs, needs, strict=True))


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.options = inputs[7:10]


def _backward(ctx, grad, *unused):
    needs = list(ctx.needs_input_grad[:7])
    if grad is None:
        return (None,) * 11
    grads = _common.call(_project_backward, _backward_impl, (grad, *ctx.saved_tensors), *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None


_INPUTS = "Tensor x, Tensor ln_weight, Tensor ln_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2"
_project_backward = _common.define_op(
    "pixel_shuffle_projection_backward",
    f"(Tensor grad, {_INPUTS}, Tensor z, Tensor stats, SymInt[] grid, bool class_token, float eps, bool[7] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl, _backward_fake,
)  # fmt: skip
_project = _common.define_op(
    "pixel_shuffle_projection",
    f"({_INPUTS}, SymInt[] grid, bool class_token, float eps, bool save) -> (Tensor, Tensor, Tensor)",
    _forward_impl, _forward_fake, backward=_backward, setup_context=_setup_context,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------------------- spec


def _samples(dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, offset=0.0):
        return (scale * torch.randn(*shape, generator=generator) + offset).to(device, dtype)

    def make(label, tiles, grid, channels, hidden, out, *, biases=False, strided=0, class_token=True, offset=0.0):
        length, width = grid[0] * grid[1] + int(class_token), 4 * channels
        x = normal(tiles, length + strided, channels + strided, offset=offset)[:, :length, :channels]
        w1 = normal(hidden, width + strided, scale=width**-0.5)[:, :width]
        w2 = normal(out, hidden + strided, scale=hidden**-0.5)[:, :hidden]
        args = (x, normal(width, scale=0.3, offset=1.0), normal(width, scale=0.3), w1, w2)
        kwargs = {"grid": grid, "class_token": class_token}
        if biases:
            kwargs |= {"b1": normal(hidden, scale=0.5), "b2": normal(out, scale=0.5)}
        return SampleInput(label, args, kwargs, ("x", "ln_weight", "ln_bias", "w1", "w2", *(("b1", "b2") if biases else ())))

    yield make("no biases", 3, (4, 6), 24, 40, 29)
    yield make("biases, strided views, primes", 2, (6, 2), 13, 37, 31, biases=True, strided=3)
    yield make("no class token, mean far from 0", 5, (2, 4), 8, 16, 24, biases=True, class_token=False, offset=3.0)
    yield make("several blocks of each size", 13, (8, 8), 72, 290, 270)
    yield make("one token", 1, (2, 2), 5, 23, 71, biases=True)
    yield make("no tiles", 0, (4, 4), 8, 16, 24)


def _tokens(sample):
    grid = sample.kwargs["grid"]
    return sample.args[0].shape[0] * grid[0] * grid[1] // 4


def _bytes(sample):
    x, *_, w2 = sample.args
    written = _tokens(sample) * w2.shape[0] * x.element_size()
    return nbytes(*sample.args, sample.kwargs.get("b1"), sample.kwargs.get("b2")) + written


def _flops(sample):
    return 2 * _tokens(sample) * (sample.args[3].numel() + sample.args[4].numel())


def _flat_calls(sample):
    x, ln_weight, ln_bias, w1, w2 = sample.args
    inputs = (x, ln_weight, ln_bias, w1, sample.kwargs.get("b1"), w2, sample.kwargs.get("b2"))
    options = ([*sample.kwargs["grid"]], sample.kwargs["class_token"], 1e-5)
    yield _project, (*inputs, *options, True)
    y, z, stats = _project(*inputs, *options, True)
    biases = inputs[4] is not None
    yield _project_backward, (torch.ones_like(y), *inputs, z, stats, *options, [True, True, True, True, biases, True, biases])
    yield _project_backward, (torch.ones_like(y), *inputs, z, stats, *options, [False, False, False, False, False, True, False])


SPEC = OpSpec(
    name="pixel_shuffle_projection", op=pixel_shuffle_projection, reference=reference, base=base, samples=_samples, outputs=("y",),
    autocast=("x", "w1", "b1", "w2", "b2"),
    bytes=_bytes, flops=_flops, flat_calls=_flat_calls,
)  # fmt: skip
