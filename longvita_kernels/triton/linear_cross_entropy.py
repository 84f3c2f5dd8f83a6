"""linear_cross_entropy on Triton: three matrix products over the supervised rows, however many there are; nothing synchronises.

The host knows only how many rows there may be. `compact_kernel` writes the positions of the supervised ones and their number R; the grids
that follow are persistent and read R on the device. A chunk of rows (at most WORKSPACE bytes of logits) then takes these steps:

    gather      x[m] = hidden[rows[kept[m]]], zeros up to the next multiple of 64 rows
    logits      l = softcap(x · weightᵀ), stored rounded to the inputs' dtype, and of each tile max, Σ exp(l − max), Σ l from the unrounded l
    combine     statistics of each row, and the coefficients of its gradient
    gradient    l becomes d loss / d (x · weightᵀ) in place: reads and writes what one of the products takes 1/40 of its time for (H = 5120)
    products    gradient · weight, into float32 rows; gradientᵀ · x, added up over the chunks in float32

Where the gradients need numbers that come later (`rows_gradient`), chunks are columns: the logits are made again, their gradient in the same
kernel, and the gradient of weight is complete, so it is rounded at once. Every sum has an order that depends on sizes alone.
"""

import torch
import triton
import triton.language as tl

from longvita_kernels.ops import _common
from longvita_kernels.triton import _launch, _matmul
from longvita_kernels.triton._compile import CAPABILITIES, CompileSpec

WORKSPACE = 1280 << 20  # bytes of logits that exist at a time: 4,352 rows of 152,064 in bfloat16
_STATISTICS_ROWS = 8192  # rows at a time where no logits are kept
_COMPACT, _GATHER, _COMBINE, _GRADIENT, _SCALE = 8192, (16, 256), (32, 32), (4, 1024), (8, 512)


def loss_pass(hidden, weight, rows, labels, row_weight, ignore_index, softcap, z_loss, smoothing, needs, statistics, grad_rows, grad_weight):
    """Fills statistics (5, n), grad_rows (n, H), where supervised, and grad_weight (V, H), as far as needed, of a summed loss.

    rows (n,) of hidden; labels (n,), row_weight (n,) float32 or None; statistics are zeros where nothing is supervised
    """
    vocab, n = weight.shape[0], rows.shape[0]
    kept, count = _compact(labels, ignore_index)
    chunk = _chunk_rows(vocab, n, hidden.element_size()) if any(needs) else _statistics_rows(n)
    x, logits = _x_buffer(hidden, chunk), _logits_buffer(hidden, chunk, vocab) if any(needs) else None
    partial, coefficients = _partial(hidden, vocab, chunk), hidden.new_empty(3, n, dtype=torch.float32)
    options = (row_weight, z_loss, smoothing)
    for first in range(0, max(n, 1), chunk):  # at least once, because that writes all of grad_weight
        _gather(hidden, rows, kept, count, first, x)
        _logits(x, weight, logits, partial, kept, labels, count, first, softcap, 0, statistics)
        _combine(partial, kept, labels, count, first, chunk, vocab, 0, statistics, coefficients, *options)
        if not any(needs):
            continue
        _gradient(logits, vocab, kept, labels, count, first, softcap, statistics, coefficients)
        if needs[0]:
            _matmul.matmul(logits, weight, grad_rows, index=kept, along="M", count=count, count_along="M", first=first)
        if needs[1]:
            _matmul.matmul(logits.T, x, grad_weight, count=count, count_along="K", first=first, accumulate=first > 0)


def rows_statistics(hidden, weight, labels, ignore_index, softcap, vocab_start):
    """→ statistics (5, T) of the supervised rows, 0 elsewhere."""
    statistics = hidden.new_zeros(5, labels.shape[0], dtype=torch.float32)
    kept, count = _compact(labels, ignore_index)
    chunk = _statistics_rows(labels.shape[0])
    x, partial = _x_buffer(hidden, chunk), _partial(hidden, weight.shape[0], chunk)
    for first in range(0, labels.shape[0], chunk):
        _gather(hidden, None, kept, count, first, x)
        _logits(x, weight, None, partial, kept, labels, count, first, softcap, vocab_start, statistics)
        _combine(partial, kept, labels, count, first, chunk, weight.shape[0], vocab_start, statistics, None, None, 0.0, 0.0)
    return statistics


def rows_gradient(grad, hidden, weight, labels, statistics, ignore_index, softcap, vocab_start, needs):
    """Gradients of hidden and weight from those of lse, target and sum, grad[:3] (3, T): logits are made again by columns."""
    (T, H), V = hidden.shape, weight.shape[0]
    grad_weight = weight.new_empty(weight.shape) if needs[1] else _common.absent(weight)
    grad_rows = hidden.new_empty(T if needs[0] else 0, H, dtype=torch.float32)
    kept, count = _compact(labels, ignore_index)
    most = max(128, _round_up(T, 128))
    columns = max(256, min(_round_up(V, 256), WORKSPACE // (most * hidden.element_size()) // 256 * 256))
    x, gradient = _x_buffer(hidden, most), _logits_buffer(hidden, most, min(columns, V))
    _gather(hidden, None, kept, count, 0, x)
    coefficients = grad[:3].contiguous()
    for start in range(0, V, columns):
        part = weight[start : start + columns]
        logits = gradient[:, : part.shape[0]]
        _logits(x, part, logits, None, kept, labels, count, 0, softcap, vocab_start + start, statistics, coefficients)
        if needs[0]:
            _matmul.matmul(logits, part, grad_rows, index=kept, along="M", count=count, count_along="M", accumulate=start > 0)
        if needs[1]:
            _matmul.matmul(logits.T, x, grad_weight[start : start + columns], count=count, count_along="K")
    grad_hidden = scaled_rows(None, hidden, None, statistics, grad_rows) if needs[0] else _common.absent(hidden)
    return grad_hidden, grad_weight


def scaled_rows(factor, hidden, rows, statistics, grad_rows):
    """→ gradient of hidden (T, H): grad_rows (n, H) · factor at `rows`, rounded once; zeros where statistics tell of no supervision."""
    n, H = grad_rows.shape
    out = hidden.new_empty(hidden.shape) if n == hidden.shape[0] else hidden.new_zeros(hidden.shape)
    if n and H:
        BLOCK_M, BLOCK_H = _SCALE
        scaled_rows_kernel[(triton.cdiv(n, BLOCK_M), triton.cdiv(H, BLOCK_H))](
            grad_rows, statistics[4], rows, factor, out, n, hidden.shape[0], H, ROWS=rows is not None, FACTOR=factor is not None,
            BLOCK_M=BLOCK_M, BLOCK_H=BLOCK_H, num_warps=4,
        )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------- sizes and buffers


def _round_up(size, unit):
    return -(-size // unit) * unit


def _chunk_rows(vocab, n, element_size):
    """Rows whose logits exist at one time, a multiple of 128: a function of the sizes alone, because the order of sums follows it."""
    return max(128, min(_round_up(n, 128), WORKSPACE // (_round_up(vocab, 64) * element_size) // 128 * 128))


def _statistics_rows(n):
    """The same where no logits are kept."""
    return max(128, min(_round_up(n, 128), _STATISTICS_ROWS))


def _x_buffer(hidden, rows):
    return hidden.new_empty(rows, hidden.shape[1])


def _logits_buffer(hidden, rows, columns):
    """(rows, columns) with rows that start at multiples of 128 bytes."""
    return hidden.new_empty(rows, _round_up(columns, 64))[:, :columns]


def _partial(hidden, vocab, rows):
    """max, Σ exp(l − max) and Σ l of each row in each tile of columns."""
    return hidden.new_empty(3, triton.cdiv(vocab, _tile(hidden).n), rows, dtype=torch.float32)


def _tile(tensor):
    return _matmul.tile_for(tensor.dtype, _launch.capability(tensor.device))


# ---------------------------------------------------------------------------------------------------------------------------------- rows


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


def _compact(labels, ignore_index):
    n = labels.shape[0]
    kept, count = (torch.empty(size, dtype=torch.int32, device=labels.device) for size in (max(n, 1), 1))
    compact_kernel[(1,)](labels.contiguous(), kept, count, n, ignore_index, BLOCK=_COMPACT, num_warps=8)
    return kept, count


@triton.jit
def gather_kernel(hidden, rows, kept, count, first, x, T, chunk, H, stride, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    present = _matmul.device_rows(count, first, chunk)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < tl.cdiv(present, 64) * 64:
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        source = tl.load(kept + first + m, mask=m < present, other=0).to(tl.int64)
        if ROWS:
            source = tl.minimum(tl.maximum(tl.load(rows + source), 0), T - 1)
        values = tl.load(hidden + source[:, None] * stride + h[None, :], mask=(m < present)[:, None] & (h < H)[None, :], other=0.0)
        tl.store(x + m.to(tl.int64)[:, None] * H + h[None, :], values, mask=(h < H)[None, :])


def _gather(hidden, rows, kept, count, first, x):
    (BLOCK_M, BLOCK_H), (chunk, H) = _GATHER, x.shape
    if H and hidden.shape[0]:
        gather_kernel[(triton.cdiv(chunk, BLOCK_M), triton.cdiv(H, BLOCK_H))](
            hidden, rows, kept, count, first, x, hidden.shape[0], chunk, H, hidden.stride(0), ROWS=rows is not None,
            BLOCK_M=BLOCK_M, BLOCK_H=BLOCK_H, num_warps=4,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------------------- logits


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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """GRADIENT: stores the gradient of the logits; else their partial statistics and, with STORE, the logits. Row m of x is position
    kept[first + m]; labels and statistics stand at positions, n of them."""
    present = _matmul.device_rows(count, first, chunk)
    tiles_m, tiles_n = tl.cdiv(present, BLOCK_M), tl.cdiv(V, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _matmul.tile_position(tile, tiles_m, tiles_n, 16)
        m, v = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ok_M, ok_N = m < present, v < V
        x_MK = x + m.to(tl.int64)[:, None] * H + k[None, :]
        w_KN = w + v.to(tl.int64)[None, :] * stride_w + k[:, None]
        l = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        l = _matmul.multiply(l, x_MK, w_KN, ok_M, ok_N, H, 1, 1, BLOCK_K, EVEN_K, PRECISION)
        if CAP:
            l = softcap * tanh(l / softcap)
        at = tl.load(kept + first + m, mask=ok_M, other=0)
        label = tl.load(labels + at, mask=ok_M, other=-1) - vocab_start
        is_label = label[:, None] == v[None, :]
        if GRADIENT:
            largest, exp_sum, of_lse, of_target, of_sum = row_numbers(statistics, coefficients, at, ok_M, n, n)
            l = logit_gradient(
                l, is_label, largest[:, None], exp_sum[:, None], of_lse[:, None], of_target[:, None], of_sum[:, None], softcap, CAP
            )
        else:
            shown = tl.where(ok_N[None, :], l, float("-inf"))
            largest = tl.max(shown, 1)
            column = partial + tile_n.to(tl.int64) * partial_rows + m
            step = tl.cast(tiles_n, tl.int64) * partial_rows
            tl.store(column, largest, mask=ok_M)
            tl.store(column + step, tl.sum(tl.exp(shown - largest[:, None]), 1), mask=ok_M)
            tl.store(column + 2 * step, tl.sum(tl.where(ok_N[None, :], l, 0.0), 1), mask=ok_M)
            inside = (label >= tile_n * BLOCK_N) & (label < tl.minimum(tile_n * BLOCK_N + BLOCK_N, V))
            tl.store(statistics + n + at, tl.sum(tl.where(is_label, l, 0.0), 1), mask=ok_M & inside)
        if STORE:  # rows beyond the last, up to a multiple of 64, take part in the product over rows as zeros
            tl.store(logits + m.to(tl.int64)[:, None] * stride_l + v[None, :], _matmul.rounded(l, logits.dtype.element_ty),
                     mask=(m < chunk)[:, None] & ok_N[None, :])  # fmt: skip


def _logits(x, weight, logits, partial, kept, labels, count, first, softcap, vocab_start, statistics, coefficients=None):
    tile, (V, H), chunk = _tile(x), weight.shape, x.shape[0]
    grid = _launch.programs(x.device, triton.cdiv(chunk, tile.m) * triton.cdiv(V, tile.n), tile.per_sm)
    logits_kernel[(grid,)](
        x, weight, logits, partial, kept, labels, count, first, statistics, coefficients, softcap, vocab_start, chunk, V, H, labels.shape[0],
        weight.stride(0), 0 if logits is None else logits.stride(0), 0 if partial is None else partial.shape[2],
        CAP=softcap > 0.0, STORE=logits is not None, GRADIENT=coefficients is not None, EVEN_K=H % tile.k == 0,
        PRECISION=_matmul.precision(x.dtype), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def combine_kernel(
    partial, kept, labels, count, first, statistics, coefficients, row_weight, z_loss, smoothing, vocab_start, tiles, chunk, V, n,
    partial_rows, COEFFICIENTS: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Statistics of a row from those of its tiles, and the coefficients of lse, target and sum in its loss."""
    present = _matmul.device_rows(count, first, chunk)
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


def _combine(partial, kept, labels, count, first, chunk, V, vocab_start, statistics, coefficients, row_weight, z_loss, smoothing):
    BLOCK_M, BLOCK_T = _COMBINE
    combine_kernel[(triton.cdiv(chunk, BLOCK_M),)](
        partial, kept, labels, count, first, statistics, coefficients, row_weight, z_loss, smoothing, vocab_start, partial.shape[1], chunk, V,
        labels.shape[0], partial.shape[2], COEFFICIENTS=coefficients is not None, WEIGHT=row_weight is not None,
        BLOCK_M=BLOCK_M, BLOCK_T=BLOCK_T, num_warps=4,
    )  # fmt: skip


@triton.jit
def gradient_kernel(
    logits, kept, labels, count, first, statistics, coefficients, softcap, chunk, V, n, stride_l,
    CAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The logits of a chunk become their gradient, in place; rows beyond the last become 0 up to the next multiple of 64."""
    present = _matmul.device_rows(count, first, chunk)
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
        tl.store(where, _matmul.rounded(tl.where(ok[:, None], gradient, 0.0), logits.dtype.element_ty), mask=ok_V & (m < chunk)[:, None])


def _gradient(logits, V, kept, labels, count, first, softcap, statistics, coefficients):
    (BLOCK_M, BLOCK_V), chunk = _GRADIENT, logits.shape[0]
    grid = _launch.programs(logits.device, triton.cdiv(chunk, BLOCK_M) * triton.cdiv(V, BLOCK_V), 8)
    gradient_kernel[(grid,)](
        logits, kept, labels, count, first, statistics, coefficients, softcap, chunk, V, labels.shape[0], logits.stride(0),
        CAP=softcap > 0.0, BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, num_warps=4,
    )  # fmt: skip


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
    tl.store(out + target[:, None] * H + h[None, :], _matmul.rounded(values, out.dtype.element_ty), mask=(i < n)[:, None] & (h < H)[None, :])
