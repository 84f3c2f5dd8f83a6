"""pixel_shuffle_projection on Triton. A token's 4C channels are read where they stand in x: two runs of 2C, or four of C where patches are
strided; neither the shuffled nor the normalised matrix is made. LayerNorm is folded into the first product:

    g[d, k] = w1[d, k] · ln_weight[k]     u[d] = Σ_k g[d, k]     c[d] = Σ_k w1[d, k] · ln_bias[k] + b1[d]
    z = rstd · ((s − shift) · gᵀ − (mean − shift) · u) + c

shift is 0, so that s goes to the tensor cores as it is; in rows whose mean is more than 32 times the deviation, where the difference would
cancel, and in float32 it is the mean, subtracted on the way (a loop of its own, entered only by tiles with such a row).

Backward needs four products, and no pass over anything of the size of x. With dz = (grad · w2) ∘ GELU'(z):

    d w2 = gradᵀ · GELU(z)        p[d, k] = Σ_t dz[t, d] · n[t, k],  n = rstd · (s − mean)
    d w1 = p · ln_weight + (Σ_t dz) ⊗ ln_bias
    d ln_weight[k] = Σ_d w1[d, k] · p[d, k]        d ln_bias[k] = Σ_d w1[d, k] · Σ_t dz[t, d]
    d s = rstd · (dz · g − m1 − n · m2)        m1 = Σ_d dz · u / 4C        m2 = Σ_d dz · (z − c) / 4C

so the sums of LayerNorm over a row come from z, before d s exists. A frozen ViT (no d x) leaves out the last line, and LayerNorm's own
gradients fall out of p. In bfloat16 rstd is folded into dz, so that p has s as it is (float16 has not the range for that).
"""

import torch
import triton

from longvita_kernels.ops import _common, _gemm
from longvita_kernels.triton import _launch, _matmul
from longvita_kernels.triton._compile import CAPABILITIES, spec
from longvita_kernels.triton._projector import (
    FAR,
    fold_kernel,
    grad_tokens_kernel,
    grad_weight_kernel,
    grad_z_kernel,
    project_kernel,
    statistics_kernel,
)

_STATISTICS, _FOLD = (4, 512), (8, 512)


def forward(x, ln_weight, ln_bias, w1, b1, w2, b2, grid, class_token, eps, save):
    """→ y (N, rows/2 · cols/2, O), z (tokens, D) if save, stats (2, tokens): mean and 1 / deviation."""
    view = _Tokens(x, grid, class_token)
    D, z = w1.shape[0], x.new_empty(view.tokens if save else 0, w1.shape[0])
    stats, act = x.new_empty(2, view.tokens, dtype=torch.float32), x.new_empty(view.tokens, D)
    if view.tokens and D:
        BLOCK_T, BLOCK_C = _STATISTICS
        statistics_kernel[(triton.cdiv(view.tokens, BLOCK_T),)](
            *view.arguments, stats, eps, **view.constants, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, num_warps=4
        )
        folded, u, c = _fold(w1, ln_weight, ln_bias, b1)
        tile = _tile(x)
        project_kernel[(_programs(x, tile, view.tokens, D),)](
            *view.arguments, stats, folded, u, c, act, z, D, **view.constants, SAVE=save,
            EVEN=view.run % tile.k == 0, DEEP=x.dtype == torch.float32, **_blocks(x, tile),
        )  # fmt: skip
    y = torch.mm(act, w2.T) if b2 is None else torch.addmm(b2, act, w2.T)
    return y.view(x.shape[0], -1, w2.shape[0]) if y.numel() else y.new_empty(x.shape[0], grid[0] * grid[1] // 4, w2.shape[0]), z, stats


def backward(grad, x, ln_weight, ln_bias, w1, b1, w2, b2, z, stats, grid, class_token, eps, needs):
    """Gradients of x, ln_weight, ln_bias, w1, b1, w2, b2, as far as needed."""
    need_x, need_lw, need_lb, need_w1, need_b1, need_w2, need_b2 = needs
    view = _Tokens(x, grid, class_token)
    grad = _gemm.dense_rows(grad.reshape(view.tokens, w2.shape[0]))
    found = [_common.absent(x) for _ in needs]
    if need_b2:
        found[6] = grad.sum(0, dtype=torch.float32).to(b2.dtype)
    if not any(needs[:5]):
        if need_w2:
            found[5] = torch.mm(grad.T, torch.nn.functional.gelu(z))
        return tuple(found)
    folded, u, c = _fold(w1, ln_weight, ln_bias, b1)
    dz, act, sums, columns = _grad_z(grad, w2, z, stats, u, c, view, x, need_x, need_w2)
    of_bias, of_mean = columns.sum(1)  # Σ_t dz, and what shift leaves of the mean
    if need_w2:
        found[5] = torch.mm(grad.T, act)
    if need_b1:
        found[4] = of_bias.to(b1.dtype)
    if need_w1 or need_lw or need_lb:
        found[3], of_ln = _grad_weight(dz, x, view, stats, w1, ln_weight, ln_bias, of_bias, of_mean, need_w1, need_lw or need_lb)
        found[1], found[2] = (v.to(t.dtype) if need else _common.absent(x) for v, t, need in zip(
            of_ln, (ln_weight, ln_bias), (need_lw, need_lb), strict=True))  # fmt: skip
    if need_x:
        found[0] = _grad_x(dz, folded, x, view, stats, sums, grid, class_token)
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------- sizes and launches


class _Tokens:
    """x as the kernels take it."""

    def __init__(self, x, grid, class_token):
        self.patches = x[:, 1:] if class_token else x
        tiles, _, self.channels = x.shape
        across = grid[1] // 2
        self.tokens = tiles * (grid[0] // 2) * across
        stride_n, stride_p = self.patches.stride()[:2]
        dense = stride_p == self.channels
        self.run, runs = (2 * self.channels, 2) if dense else (self.channels, 4)
        self.arguments = (self.patches, self.tokens, stride_n, stride_p, self.run)
        self.constants = {"PER_TILE": grid[0] // 2 * across, "ACROSS": across, "RUNS": runs}


def _tile(x, kind="wide"):
    return _matmul.tile_for(x.dtype, _launch.capability(x.device), kind)


def _programs(x, tile, rows, columns):
    return _launch.programs(x.device, triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n), tile.per_sm)


def _blocks(x, tile):
    """What every product is launched with."""
    return _matmul.blocks(x.dtype, tile) | {"num_warps": tile.warps, "num_stages": tile.stages}


def _fold(w1, ln_weight, ln_bias, b1):
    (D, K), (BLOCK_D, BLOCK_K) = w1.shape, _FOLD
    folded, u, c = w1.new_empty(D, K), *(w1.new_empty(D, dtype=torch.float32) for _ in range(2))
    fold_kernel[(max(1, triton.cdiv(D, BLOCK_D)),)](
        w1, ln_weight.contiguous(), ln_bias.contiguous(), None if b1 is None else b1.contiguous(), folded, u, c, D, K, w1.stride(0),
        BIAS=b1 is not None, BLOCK_D=BLOCK_D, BLOCK_K=BLOCK_K, num_warps=4,
    )  # fmt: skip
    return folded, u, c


def _grad_z(grad, w2, z, stats, u, c, view, x, need_sums, need_act):
    """dz, GELU(z), m1 and m2 by tile, column sums by tile."""
    tile, (O, D) = _tile(x, "narrow"), w2.shape
    tokens = view.tokens
    dz, act = x.new_empty(tokens, D), x.new_empty(tokens if need_act else 0, D)
    sums = x.new_empty(2, 2 * triton.cdiv(D, tile.n) if need_sums else 0, tokens, dtype=torch.float32)
    columns = x.new_empty(2, triton.cdiv(tokens, tile.m), D, dtype=torch.float32)
    if tokens and D:
        grad_z_kernel[(_programs(x, tile, tokens, D),)](
            grad, w2, z, stats, u, c, dz, act, sums, columns, tokens, D, O, 4 * view.channels, grad.stride(0), w2.stride(0),
            SUMS=need_sums, ACT=need_act, FOLD=_folds(x), DEEP=x.dtype == torch.float32, EVEN=O % tile.k == 0, **_blocks(x, tile),
        )  # fmt: skip
    return dz, act, sums, columns


def _folds(x):
    """Whether rstd is part of dz."""
    return x.dtype == torch.bfloat16


def _grad_weight(dz, x, view, stats, w1, ln_weight, ln_bias, of_bias, of_mean, need_weight, need_ln):
    """d w1, and d ln_weight and d ln_bias (2, K) in float32."""
    tile, (D, K) = _tile(x), w1.shape
    out = w1.new_empty(D, K) if need_weight else _common.absent(x)
    of_ln = x.new_empty(2, triton.cdiv(D, tile.m) if need_ln else 0, K, dtype=torch.float32)
    if D:
        far = ((stats[0].abs() * stats[1]) > FAR).any()
        grad_weight_kernel[(_programs(x, tile, D, K),)](
            dz, *view.arguments, stats, far, w1, ln_weight.contiguous(), ln_bias.contiguous(), of_bias, of_mean, out, of_ln, D,
            w1.stride(0), **view.constants, FOLD=_folds(x), WEIGHT=need_weight, LN=need_ln, **_blocks(x, tile),
        )  # fmt: skip
    return out, of_ln.sum(1)


def _grad_x(dz, folded, x, view, stats, sums, grid, class_token):
    tile, D = _tile(x), dz.shape[1]
    out = x.new_empty(x.shape)
    patches = out[:, 1:] if class_token else out
    if class_token:
        out[:, 0].zero_()
    if view.tokens:
        grad_tokens_kernel[(_programs(x, tile, view.tokens, 4 * view.channels),)](
            dz, folded, *view.arguments, stats, sums, patches, *patches.stride()[:2], D, sums.shape[1],
            **view.constants, FOLD=_folds(x), EVEN=D % tile.k == 0, **_blocks(x, tile),
        )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------------------------------------- compiling


_X_INTS = "tokens stride_n stride_p run"
_GRID = {"PER_TILE": 256, "ACROSS": 16, "RUNS": 2}


def compile_specs():
    """What `make cuda-check` compiles."""
    for capability in CAPABILITIES:
        yield from _element_specs(capability)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield from _product_specs(capability, dtype)


def _element_specs(capability):
    sizes = _GRID | {"BLOCK_T": _STATISTICS[0], "BLOCK_C": _STATISTICS[1]}
    types = {"*bf16": "x", "i32": _X_INTS, "*fp32": "stats", "fp32": "eps"}
    yield spec("pixel_shuffle_projection statistics", statistics_kernel, capability, types, sizes)
    types = {"*bf16": "w1 ln_weight ln_bias b1 folded", "*fp32": "u c", "i32": "D K stride_w"}
    yield spec("pixel_shuffle_projection fold", fold_kernel, capability, types, {"BIAS": True, "BLOCK_D": _FOLD[0], "BLOCK_K": _FOLD[1]})


def _product_specs(capability, dtype):
    kind, deep, fold = _matmul.TYPES[dtype], dtype == torch.float32, dtype == torch.bfloat16

    def make(name, kernel, operands, floats, ints, more=None, *, tile="wide", **constexprs):
        tile = _matmul.tile_for(dtype, capability, tile)
        types = {f"*{kind}": operands, "i32": ints} | (more or {})
        types["*fp32"] = types.get("*fp32", "") + " " + floats
        return spec(
            f"pixel_shuffle_projection {name} {kind}", kernel, capability, types, constexprs | _matmul.blocks(dtype, tile),
            warps=tile.warps, stages=tile.stages, matrix=not deep,
        )  # fmt: skip

    yield make(
        "grad weight", grad_weight_kernel, "dz x w1 ln_weight ln_bias grad_w1", "stats of_bias of_mean of_ln", _X_INTS + " D stride_w",
        {"*i1": "far"}, **_GRID, FOLD=fold, WEIGHT=True, LN=True,
    )  # fmt: skip
    if dtype == torch.float16:
        return  # the rest is as in bfloat16
    yield make("forward", project_kernel, "x g act z", "stats u c", _X_INTS + " D", **_GRID, SAVE=True, EVEN=True, DEEP=deep)
    yield make(
        "grad z", grad_z_kernel, "grad w2 z dz act", "stats u c sums columns", "tokens D O K stride_g stride_w",
        tile="narrow", SUMS=True, ACT=True, FOLD=fold, EVEN=True, DEEP=deep,
    )  # fmt: skip
    yield make(
        "grad x", grad_tokens_kernel, "dz g x grad_x", "stats sums", _X_INTS + " grad_stride_n grad_stride_p D sum_tiles",
        **_GRID, FOLD=fold, EVEN=True,
    )  # fmt: skip
