"""The kernels of linear_cross_entropy; what they are for stands in triton/linear_cross_entropy.py.

m counts the rows of a chunk, of which row 0 is position `first` among the kept ones; kept[first + m] is its position among all n, where its
label, statistics (5, n) and coefficients (3, n) stand.
"""

import triton
import triton.language as tl

from longvita_kernels.triton._matmul import device_rows, half, multiply, multiply_blocks, rounded, tile_position


@triton.jit
def compact_kernel(labels, kept, count, n, ignore_index, BLOCK: tl.constexpr):
    """kept[0 … count−1]: positions whose label is not ignore_index, ascending. One program: 8 MB of labels at a million tokens."""
    found = 0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        keep = (i < n) & (tl.load(labels + i, mask=i < n, other=0) != ignore_index)
        ones = keep.to(tl.int32)
        tl.store(kept + found + tl.cumsum(ones, 0) - 1, i, mask=keep)
        found += tl.sum(ones, 0)
    tl.store(count, found)


@triton.jit
def gather_kernel(
    hidden, rows, kept, count, first, x, T, chunk, H, stride, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Rows of a chunk of hidden, zeros after the last up to a multiple of 64. ROWS: positions are of `rows`, which names rows of hidden."""
    present = device_rows(count, first, chunk)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < tl.cdiv(present, 64) * 64:
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        source = tl.load(kept + first + m, mask=m < present, other=0).to(tl.int64)
        if ROWS:
            source = tl.minimum(tl.maximum(tl.load(rows + source), 0), T - 1)
        values = tl.load(hidden + source[:, None] * stride + h[None, :], mask=(m < present)[:, None] & (h < H)[None, :], other=0.0)
        tl.store(x + m.to(tl.int64)[:, None] * H + h[None, :], values, mask=(m < chunk)[:, None] & (h < H)[None, :])


@triton.jit
def tanh(x):
    """To about two units in the last place; the quotient alone loses the small ones."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    s = x * x
    series = x * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * 62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -large, large))


@triton.jit
def logit_gradient(l, is_label, largest, exp_sum, of_lse, of_target, of_sum, softcap, CAP: tl.constexpr):
    """Gradient of x · weightᵀ where l is its softcapped value; the last three before softcap are the row's coefficients."""
    gradient = of_lse * tl.exp(l - largest) / exp_sum + of_sum + tl.where(is_label, of_target, 0.0)
    if CAP:
        gradient *= 1.0 - (l / softcap) * (l / softcap)
    return gradient


@triton.jit
def row_numbers(statistics, coefficients, at, ok, stat_stride, coef_stride):
    """(largest, Σ exp) and the three coefficients of the rows `at`; what makes a gradient of 0 where not ok."""
    largest = tl.load(statistics + 3 * stat_stride + at, mask=ok, other=0.0)
    exp_sum = tl.load(statistics + 4 * stat_stride + at, mask=ok, other=1.0)
    of_lse = tl.load(coefficients + at, mask=ok, other=0.0)
    of_target = tl.load(coefficients + coef_stride + at, mask=ok, other=0.0)
    of_sum = tl.load(coefficients + 2 * coef_stride + at, mask=ok, other=0.0)
    return largest, exp_sum, of_lse, of_target, of_sum


@triton.jit
def logits_kernel(
    x, w, logits, partial, kept, labels, count, first, statistics, coefficients, softcap, vocab_start, chunk, V, H, n,
    stride_w, stride_l, partial_rows,
    CAP: tl.constexpr, STORE: tl.constexpr, GRADIENT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA_A: tl.constexpr, TMA_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """GRADIENT: stores the gradient of the logits; else their partial statistics and, with STORE, the logits. Row m of x is position
    kept[first + m]; labels and statistics stand at positions, n of them."""
    present = device_rows(count, first, chunk)
    tiles_m, tiles_n = tl.cdiv(present, BLOCK_M), tl.cdiv(V, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, 16)
        m, v = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ok_M, ok_N = m < present, v < V
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA_A == "":
            x_MK = x + m.to(tl.int64)[:, None] * H + k[None, :]
            w_KN = w + v.to(tl.int64)[None, :] * stride_w + k[:, None]
            product = multiply(product, x_MK, w_KN, ok_M, ok_N, H, 1, 1, BLOCK_K, EVEN_K, PRECISION)
        else:  # rows that do not exist hold anything; what comes of them is stored nowhere, or read by nobody
            product = multiply_blocks(product, x, w, tile_m * BLOCK_M, tile_n * BLOCK_N, H, TMA_A, TMA_B, BLOCK_K, PRECISION)
        at = tl.load(kept + first + m, mask=ok_M, other=0)
        label = tl.load(labels + at, mask=ok_M, other=-1) - vocab_start
        for side in tl.static_range(2):
            l = half(product, side)
            if CAP:
                l = softcap * tanh(l / softcap)
            part = 2 * tile_n + side
            v = part * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            ok_N = v < V
            is_label = label[:, None] == v[None, :]
            if GRADIENT:
                largest, exp_sum, of_lse, of_target, of_sum = row_numbers(statistics, coefficients, at, ok_M, n, n)
                l = logit_gradient(
                    l, is_label, largest[:, None], exp_sum[:, None], of_lse[:, None], of_target[:, None], of_sum[:, None], softcap, CAP
                )
            elif part * (BLOCK_N // 2) < V:
                shown = tl.where(ok_N[None, :], l, float("-inf"))
                largest = tl.max(shown, 1)
                column = partial + tl.cast(part, tl.int64) * partial_rows + m
                step = tl.cast(tl.cdiv(V, BLOCK_N // 2), tl.int64) * partial_rows
                tl.store(column, largest, mask=ok_M)
                tl.store(column + step, tl.sum(tl.exp(shown - largest[:, None]), 1), mask=ok_M)
                tl.store(column + 2 * step, tl.sum(tl.where(ok_N[None, :], l, 0.0), 1), mask=ok_M)
                inside = (label >= part * (BLOCK_N // 2)) & (label < tl.minimum((part + 1) * (BLOCK_N // 2), V))
                tl.store(statistics + n + at, tl.sum(tl.where(is_label, l, 0.0), 1), mask=ok_M & inside)
            if STORE:  # rows beyond the last, up to a multiple of 64, take part in the product over rows as zeros
                tl.store(logits + m.to(tl.int64)[:, None] * stride_l + v[None, :], rounded(l, logits.dtype.element_ty),
                         mask=(m < chunk)[:, None] & ok_N[None, :])  # fmt: skip


@triton.jit
def combine_kernel(
    partial, kept, count, first, statistics, coefficients, row_weight, z_loss, smoothing, tiles, chunk, V, n,
    partial_rows, COEFFICIENTS: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Statistics of a row from those of its tiles, and the coefficients of lse, target and sum in its loss."""
    present = device_rows(count, first, chunk)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = m < present
    if tl.program_id(0) * BLOCK_M < present:
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        exp_sum, total = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        step = tl.cast(tiles, tl.int64) * partial_rows
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            some = (tile < tiles)[:, None] & ok[None, :]
            block = partial + tile.to(tl.int64)[:, None] * partial_rows + m[None, :]
            tops = tl.load(block, mask=some, other=float("-inf"))
            higher = tl.maximum(largest, tl.max(tops, 0))
            safe = tl.where(ok, higher, 0.0)
            exp_sum *= tl.exp(largest - safe)
            exp_sum += tl.sum(tl.load(block + step, mask=some, other=0.0) * tl.exp(tops - safe[None, :]), 0)
            total += tl.sum(tl.load(block + 2 * step, mask=some, other=0.0), 0)
            largest = higher
        at = tl.load(kept + first + m, mask=ok, other=0)
        lse = tl.where(ok, largest + tl.log(tl.where(ok, exp_sum, 1.0)), 0.0)
        tl.store(statistics + at, lse, mask=ok)
        tl.store(statistics + 2 * n + at, total, mask=ok)
        tl.store(statistics + 3 * n + at, largest, mask=ok)
        tl.store(statistics + 4 * n + at, exp_sum, mask=ok)
        if COEFFICIENTS:
            weight = tl.full((BLOCK_M,), 1.0, tl.float32)
            if WEIGHT:
                weight = tl.load(row_weight + at, mask=ok, other=0.0)
            tl.store(coefficients + at, weight * (1.0 + 2.0 * z_loss * lse), mask=ok)
            tl.store(coefficients + n + at, -weight * (1.0 - smoothing), mask=ok)
            tl.store(coefficients + 2 * n + at, -weight * (smoothing / V), mask=ok)


@triton.jit
def gradient_kernel(
    logits, kept, labels, count, first, statistics, coefficients, softcap, chunk, V, n, stride_l,
    CAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The logits of a chunk become their gradient, in place; rows beyond the last become 0 up to the next multiple of 64."""
    present = device_rows(count, first, chunk)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tl.cdiv(present, 64) * (64 // BLOCK_M) * tiles_v, tl.num_programs(0)):
        m, v = tile // tiles_v * BLOCK_M + tl.arange(0, BLOCK_M), tile % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
        ok, ok_V = m < present, (v < V)[None, :]
        at = tl.load(kept + first + m, mask=ok, other=0)
        label = tl.load(labels + at, mask=ok, other=-1)
        largest, exp_sum, of_lse, of_target, of_sum = row_numbers(statistics, coefficients, at, ok, n, n)
        where = logits + m.to(tl.int64)[:, None] * stride_l + v[None, :]
        l = tl.load(where, mask=ok[:, None] & ok_V, other=0.0).to(tl.float32)
        gradient = logit_gradient(
            l, label[:, None] == v[None, :], largest[:, None], exp_sum[:, None], of_lse[:, None], of_target[:, None], of_sum[:, None],
            softcap, CAP,
        )  # fmt: skip
        tl.store(where, rounded(tl.where(ok[:, None], gradient, 0.0), logits.dtype.element_ty), mask=ok_V & (m < chunk)[:, None])


@triton.jit
def scaled_rows_kernel(
    grad_rows, exp_sum, rows, factor, out, n, T, H, ROWS: tl.constexpr, FACTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    i, h = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    supervised = tl.load(exp_sum + i, mask=i < n, other=0.0) > 0.0
    target = i.to(tl.int64)
    values = tl.load(grad_rows + target[:, None] * H + h[None, :], mask=supervised[:, None] & (h < H)[None, :], other=0.0)
    if FACTOR:
        values *= tl.load(factor)
    if ROWS:
        target = tl.minimum(tl.maximum(tl.load(rows + i, mask=i < n, other=0), 0), T - 1)
    tl.store(out + target[:, None] * H + h[None, :], rounded(values, out.dtype.element_ty), mask=(i < n)[:, None] & (h < H)[None, :])
