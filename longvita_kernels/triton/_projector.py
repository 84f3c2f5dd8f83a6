"""The kernels of pixel_shuffle_projection; the mathematics stands in triton/pixel_shuffle_projection.py.

Every kernel gets x as (x, tokens, stride_n, stride_p, run, PER_TILE, ACROSS, RUNS): tokens of all tiles together, PER_TILE of them per
tile, ACROSS side by side (constants, so that dividing by them is cheap); a token is RUNS runs of `run` neighbouring elements.
K = RUNS · run = 4C.
"""

import triton
import triton.language as tl

from longvita_kernels.triton._matmul import dot, half, multiply, rounded, tile_position

# How many deviations a mean may measure before it is subtracted from the operand instead of from the result: there float32 sums still carry
# 19 bits of the difference, and 16-bit operands 11.
FAR = 32.0
_FAR = tl.constexpr(FAR)


@triton.jit
def token_offset(t, stride_n, stride_p, PER_TILE: tl.constexpr, ACROSS: tl.constexpr):
    """Where token t starts in x, in elements."""
    n, r = t // PER_TILE, t % PER_TILE
    patch = r // ACROSS * (4 * ACROSS) + r % ACROSS * 2
    return n.to(tl.int64) * stride_n + patch.to(tl.int64) * stride_p


@triton.jit
def run_offset(r, stride_p, ACROSS: tl.constexpr, RUNS: tl.constexpr):
    """Where run r of a token starts, counted from the token's start."""
    patch = r * (2 * ACROSS) if RUNS == 2 else r // 2 * (2 * ACROSS) + r % 2
    return tl.cast(patch, tl.int64) * stride_p


@triton.jit
def row_statistics(stats, t, ok, tokens, DEEP: tl.constexpr):
    """mean, rstd and shift of tokens; DEEP (float32): the mean is always subtracted from the operand."""
    mean, rstd = tl.load(stats + t, mask=ok, other=0.0), tl.load(stats + tokens + t, mask=ok, other=0.0)
    shift = mean if DEEP else tl.where(tl.abs(mean) * rstd > _FAR, mean, 0.0)
    return mean, rstd, shift


@triton.jit
def gelu(z):
    """z · Φ(z) and its derivative."""
    cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


# --------------------------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def statistics_kernel(
    x, tokens, stride_n, stride_p, run, stats, eps,
    PER_TILE: tl.constexpr, ACROSS: tl.constexpr, RUNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and 1 / sqrt(variance + eps), in two passes (the second comes from cache)."""
    t, c = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    ok = t < tokens
    start = x + token_offset(t, stride_n, stride_p, PER_TILE, ACROSS)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for r in range(RUNS):
        for at in range(0, run, BLOCK_C):
            source = start[:, None] + run_offset(r, stride_p, ACROSS, RUNS) + at + c[None, :]
            total += tl.load(source, mask=ok[:, None] & (at + c < run)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / (RUNS * run)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for r in range(RUNS):
        for at in range(0, run, BLOCK_C):
            some = ok[:, None] & (at + c < run)[None, :]
            source = start[:, None] + run_offset(r, stride_p, ACROSS, RUNS) + at + c[None, :]
            away = tl.load(source, mask=some, other=0.0).to(tl.float32) - mean[:, None]
            total += tl.where(some, away * away, 0.0)
    tl.store(stats + t, mean, mask=ok)
    tl.store(stats + tokens + t, 1.0 / tl.sqrt(tl.sum(total, 1) / (RUNS * run) + eps), mask=ok)


@triton.jit
def fold_kernel(w1, ln_weight, ln_bias, b1, folded, u, c, D, K, stride_w, BIAS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """g = w1 · ln_weight in w1's dtype, its row sums u (of what was rounded, so that they cancel), and c."""
    d, k = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    ok, row = d < D, d.to(tl.int64)
    of_weight, of_bias = tl.zeros((BLOCK_D, BLOCK_K), tl.float32), tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for at in range(0, K, BLOCK_K):
        inside = at + k < K
        some = ok[:, None] & inside[None, :]
        w = tl.load(w1 + row[:, None] * stride_w + at + k[None, :], mask=some, other=0.0).to(tl.float32)
        g = rounded(w * tl.load(ln_weight + at + k, mask=inside, other=0.0).to(tl.float32)[None, :], folded.dtype.element_ty)
        tl.store(folded + row[:, None] * K + at + k[None, :], g, mask=some)
        of_weight += g.to(tl.float32)
        of_bias += w * tl.load(ln_bias + at + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(of_bias, 1)
    if BIAS:
        total += tl.load(b1 + d, mask=ok, other=0.0).to(tl.float32)
    tl.store(u + d, tl.sum(of_weight, 1), mask=ok)
    tl.store(c + d, total, mask=ok)


@triton.jit
def shuffled_product(
    acc, start, shift, g, row_d, ok_T, ok_D, stride_p, run, K,
    SHIFT: tl.constexpr, ACROSS: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + Σ_k (s − shift)[t, k] · g[d, k], s read from x."""
    k = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(run, BLOCK_K)
    for step in range(0, RUNS * steps):
        r, at = step // steps, step % steps * BLOCK_K
        s_TK = start[:, None] + run_offset(r, stride_p, ACROSS, RUNS) + at + k[None, :]
        g_KD = g + row_d[None, :] * K + r * run + at + k[:, None]
        if EVEN:
            s = tl.load(s_TK, mask=ok_T[:, None], other=0.0)
            right = tl.load(g_KD, mask=ok_D[None, :], other=0.0)
        else:
            s = tl.load(s_TK, mask=ok_T[:, None] & (at + k < run)[None, :], other=0.0)
            right = tl.load(g_KD, mask=ok_D[None, :] & (at + k < run)[:, None], other=0.0)
        if SHIFT:
            s = rounded(s.to(tl.float32) - shift[:, None], g.dtype.element_ty)
        acc = dot(s, right, acc, PRECISION)
    return acc


@triton.jit
def project_kernel(
    x, tokens, stride_n, stride_p, run, stats, g, u, c, act, z, D,
    PER_TILE: tl.constexpr, ACROSS: tl.constexpr, RUNS: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr, DEEP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z = LayerNorm(shuffled x) · w1ᵀ + b1 (with SAVE) and act = GELU(z), both (tokens, D)."""
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(D, BLOCK_N)
    K = RUNS * run
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, 8)
        t, d = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ok_T, ok_D, row_d = t < tokens, d < D, d.to(tl.int64)
        start = x + token_offset(t, stride_n, stride_p, PER_TILE, ACROSS)
        mean, rstd, shift = row_statistics(stats, t, ok_T, tokens, DEEP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if DEEP or tl.max(tl.abs(shift), 0) > 0.0:
            acc = shuffled_product(acc, start, shift, g, row_d, ok_T, ok_D, stride_p, run, K, True, ACROSS, RUNS, EVEN, PRECISION, BLOCK_K)
        else:
            acc = shuffled_product(acc, start, shift, g, row_d, ok_T, ok_D, stride_p, run, K, False, ACROSS, RUNS, EVEN, PRECISION, BLOCK_K)
        for side in tl.static_range(2):
            d = tile_n * BLOCK_N + side * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            ok_D = d < D
            u_D, c_D = tl.load(u + d, mask=ok_D, other=0.0), tl.load(c + d, mask=ok_D, other=0.0)
            value = rstd[:, None] * (half(acc, side) - (mean - shift)[:, None] * u_D[None, :]) + c_D[None, :]
            at, some = t.to(tl.int64)[:, None] * D + d[None, :], ok_T[:, None] & ok_D[None, :]
            if SAVE:
                tl.store(z + at, rounded(value, z.dtype.element_ty), mask=some)
            tl.store(act + at, rounded(value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476)), act.dtype.element_ty), mask=some)


# -------------------------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def grad_z_kernel(
    grad, w2, z, stats, u, c, dz, act, sums, columns, tokens, D, O, K, stride_g, stride_w,
    SUMS: tl.constexpr, ACT: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr, DEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz = (grad · w2) ∘ GELU'(z), times rstd with FOLD; act = GELU(z). Of each tile: m1 and m2 of its rows in `sums` (2, half tiles
    across, tokens), and in `columns` (2, tiles down, D) Σ_t dz, and Σ_t dz as stored · (mean − shift)."""
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(D, BLOCK_N)
    o = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, 8)
        t, d = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ok_T, ok_D, row = t < tokens, d < D, t.to(tl.int64)
        grad_MK = grad + row[:, None] * stride_g + o[None, :]
        w2_KN = w2 + o.to(tl.int64)[:, None] * stride_w + d[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = multiply(acc, grad_MK, w2_KN, ok_T, ok_D, O, 1, tl.cast(stride_w, tl.int64), BLOCK_K, EVEN, PRECISION)
        mean, rstd, shift = row_statistics(stats, t, ok_T, tokens, DEEP)
        for side in tl.static_range(2):
            part = 2 * tile_n + side
            d = part * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            ok_D = d < D
            at, some = row[:, None] * D + d[None, :], ok_T[:, None] & ok_D[None, :]
            value = tl.load(z + at, mask=some, other=0.0).to(tl.float32)
            activated, slope = gelu(value)
            if ACT:
                tl.store(act + at, rounded(activated, act.dtype.element_ty), mask=some)
            exact = half(acc, side) * slope
            if SUMS:
                u_D, c_D = tl.load(u + d, mask=ok_D, other=0.0), tl.load(c + d, mask=ok_D, other=0.0)
                place = sums + tl.cast(part, tl.int64) * tokens + t
                tl.store(place, tl.sum(exact * u_D[None, :], 1) / K, mask=ok_T)
                tl.store(place + tl.cast(2 * tiles_n, tl.int64) * tokens, tl.sum(exact * (value - c_D[None, :]), 1) / K, mask=ok_T)
            tl.store(columns + tile_m * D + d, tl.sum(exact, 0), mask=ok_D)
            stored = rounded(exact * rstd[:, None] if FOLD else exact, dz.dtype.element_ty)
            tl.store(dz + at, stored, mask=some)
            tl.store(columns + (tiles_m + tile_m) * D + d, tl.sum(stored.to(tl.float32) * (mean - shift)[:, None], 0), mask=ok_D)


@triton.jit
def token_product(
    acc, dz, x, stats, d, ok_D, column, ok_K, tokens, stride_n, stride_p, D, OPERAND: tl.constexpr,
    PER_TILE: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """acc + Σ_t dz[t, d] · s[t, k]. OPERAND: s "raw", "shifted", or "normalised"."""
    for first in range(0, tokens, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        ok_T = t < tokens
        start = token_offset(t, stride_n, stride_p, PER_TILE, ACROSS)
        left = tl.load(dz + t.to(tl.int64)[None, :] * D + d[:, None], mask=ok_D[:, None] & ok_T[None, :], other=0.0)
        s = tl.load(x + start[:, None] + column[None, :], mask=ok_T[:, None] & ok_K[None, :], other=0.0)
        if OPERAND != "raw":
            mean, rstd, shift = row_statistics(stats, t, ok_T, tokens, OPERAND == "normalised")
            near = s.to(tl.float32) - shift[:, None]
            s = rounded(near * rstd[:, None] if OPERAND == "normalised" else near, dz.dtype.element_ty)
        acc = dot(left, s, acc, PRECISION)
    return acc


@triton.jit
def grad_weight_kernel(
    dz, x, tokens, stride_n, stride_p, run, stats, far, w1, ln_weight, ln_bias, of_bias, of_mean, grad_w1, of_ln, D, stride_w,
    PER_TILE: tl.constexpr, ACROSS: tl.constexpr, RUNS: tl.constexpr, FOLD: tl.constexpr, WEIGHT: tl.constexpr, LN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p; with WEIGHT d w1 from it, with LN of each tile Σ_d w1 · p and Σ_d w1 · of_bias in of_ln (2, tiles down, K). far: whether any
    token's mean is to be subtracted from the operand."""
    steps = tl.cdiv(run, BLOCK_N)
    tiles_m, tiles_n, K = tl.cdiv(D, BLOCK_M), RUNS * steps, RUNS * run
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, 8)
        d, within = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n % steps * BLOCK_N + tl.arange(0, BLOCK_N)
        ok_D, ok_K = d < D, within < run
        column = run_offset(tile_n // steps, stride_p, ACROSS, RUNS) + within
        p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if not FOLD:
            p = token_product(
                p, dz, x, stats, d, ok_D, column, ok_K, tokens, stride_n, stride_p, D, "normalised", PER_TILE, ACROSS, PRECISION, BLOCK_K
            )
        elif tl.load(far) != 0:
            p = token_product(
                p, dz, x, stats, d, ok_D, column, ok_K, tokens, stride_n, stride_p, D, "shifted", PER_TILE, ACROSS, PRECISION, BLOCK_K
            )
        else:
            p = token_product(
                p, dz, x, stats, d, ok_D, column, ok_K, tokens, stride_n, stride_p, D, "raw", PER_TILE, ACROSS, PRECISION, BLOCK_K
            )
        sum_D = tl.load(of_bias + d, mask=ok_D, other=0.0)[:, None]
        mean_D = tl.load(of_mean + d, mask=ok_D, other=0.0)[:, None]
        for side in tl.static_range(2):
            within = tile_n % steps * BLOCK_N + side * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            ok_K, k = within < run, tile_n // steps * run + within
            some = ok_D[:, None] & ok_K[None, :]
            exact = half(p, side)
            if FOLD:
                exact -= mean_D
            if WEIGHT:
                scale = tl.load(ln_weight + k, mask=ok_K, other=0.0).to(tl.float32)
                offset = tl.load(ln_bias + k, mask=ok_K, other=0.0).to(tl.float32)
                value = exact * scale[None, :] + sum_D * offset[None, :]
                tl.store(grad_w1 + d.to(tl.int64)[:, None] * K + k[None, :], rounded(value, grad_w1.dtype.element_ty), mask=some)
            if LN:
                w = tl.load(w1 + d.to(tl.int64)[:, None] * stride_w + k[None, :], mask=some, other=0.0).to(tl.float32)
                tl.store(of_ln + tile_m * K + k, tl.sum(w * exact, 0), mask=ok_K)
                tl.store(of_ln + (tiles_m + tile_m) * K + k, tl.sum(w * sum_D, 0), mask=ok_K)


@triton.jit
def grad_tokens_kernel(
    dz, g, x, tokens, stride_n, stride_p, run, stats, sums, grad_x, grad_stride_n, grad_stride_p, D, sum_tiles,
    PER_TILE: tl.constexpr, ACROSS: tl.constexpr, RUNS: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d s = rstd · (dz · g − m1 − n · m2), put where s stands in x."""
    steps = tl.cdiv(run, BLOCK_N)
    tiles_m, tiles_n, K = tl.cdiv(tokens, BLOCK_M), RUNS * steps, RUNS * run
    i = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, 8)
        t, within = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n % steps * BLOCK_N + tl.arange(0, BLOCK_N)
        ok_T, ok_K = t < tokens, within < run
        dz_MK = dz + t.to(tl.int64)[:, None] * D + i[None, :]
        g_KN = g + i.to(tl.int64)[:, None] * K + (tile_n // steps * run + within)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = multiply(acc, dz_MK, g_KN, ok_T, ok_K, D, 1, tl.cast(K, tl.int64), BLOCK_K, EVEN, PRECISION)
        m1, m2 = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        for part in range(0, sum_tiles):
            place = sums + tl.cast(part, tl.int64) * tokens + t
            m1 += tl.load(place, mask=ok_T, other=0.0)
            m2 += tl.load(place + tl.cast(sum_tiles, tl.int64) * tokens, mask=ok_T, other=0.0)
        mean, rstd, _ = row_statistics(stats, t, ok_T, tokens, True)
        r = tile_n // steps
        start = token_offset(t, stride_n, stride_p, PER_TILE, ACROSS) + run_offset(r, stride_p, ACROSS, RUNS)
        target = token_offset(t, grad_stride_n, grad_stride_p, PER_TILE, ACROSS) + run_offset(r, grad_stride_p, ACROSS, RUNS)
        for side in tl.static_range(2):
            within = tile_n % steps * BLOCK_N + side * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            some = ok_T[:, None] & (within < run)[None, :]
            normal = (tl.load(x + start[:, None] + within[None, :], mask=some, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
            left = m1[:, None] + normal * m2[:, None]
            value = half(acc, side) - rstd[:, None] * left if FOLD else rstd[:, None] * (half(acc, side) - left)
            tl.store(grad_x + target[:, None] + within[None, :], rounded(value, grad_x.dtype.element_ty), mask=some)
