"""linear_cross_entropy on Triton: three matrix products over the supervised rows, however many there are; nothing synchronises.

The host knows only how many rows there may be. `compact_kernel` writes the positions of the supervised ones and their number R; the grids
that follow are persistent and read R on the device. A chunk of rows (at most WORKSPACE bytes of logits) then takes these steps:

    gather      x[m] = hidden[rows[kept[m]]], zeros up to the next multiple of 64 rows
    logits      l = softcap(x · weightᵀ), stored rounded to the inputs' dtype; of each half tile max, Σ exp(l − max), Σ l before rounding
    combine     statistics of each row, and the coefficients of its gradient
    gradient    l becomes d loss / d (x · weightᵀ) in place
    products    gradient · weight, into float32 rows; gradientᵀ · x, added up over the chunks in float32; backward scales both

Where the gradients of all logits are no larger than a float32 gradient of weight, they are one chunk and kept, and backward makes the
products, with the factor and the only rounding in their epilogues: nothing of the size of weight is written twice.

Where the gradients need numbers that come later (`rows_gradient`), chunks are columns: the logits are made again, their gradient in the
same kernel, and the gradient of weight is complete, so it is rounded at once. Every sum has an order that depends on sizes alone.
"""

import torch
import triton

from longvita_kernels.ops import _common
from longvita_kernels.triton import _launch, _matmul
from longvita_kernels.triton._compile import CAPABILITIES, spec
from longvita_kernels.triton._cross_entropy import (
    combine_kernel,
    compact_kernel,
    gather_kernel,
    gradient_kernel,
    logits_kernel,
    scaled_rows_kernel,
)

WORKSPACE = 1280 << 20  # bytes of logits that exist at a time: 4,352 rows of 152,064 in bfloat16
_STATISTICS_ROWS = 8192  # rows at a time where no logits are kept
_COMPACT, _GATHER, _COMBINE, _GRADIENT, _SCALE = 8192, (16, 256), (32, 32), (4, 1024), (8, 512)


def loss_pass(
    hidden, weight, rows, labels, row_weight, ignore_index, softcap, z_loss, smoothing, needs, statistics, grad_rows, grad_weight, keep
):
    """Fills statistics (5, n) and, of a summed loss, as far as needed, grad_rows (n, H), where supervised, and grad_weight (V, H), both
    float32; or, with keep, in the place of the latter the gradients of the logits (n, V), which `finish` takes.

    rows (n,) of hidden; labels (n,), row_weight (n,) float32 or None; statistics are zeros where nothing is supervised
    """
    vocab, n = weight.shape[0], rows.shape[0]
    labels = labels.contiguous()
    kept, count = _compact(labels, ignore_index)
    if keep:  # one chunk; its buffer has two or four bytes for each gradient, under whatever name
        chunk, logits = max(1, n), grad_weight.view(hidden.dtype)
    else:
        chunk = _chunk_rows(vocab, n, hidden.element_size()) if any(needs) else _statistics_rows(n)
        logits = _logits_buffer(hidden, chunk, vocab) if any(needs) else None
    x = _x_buffer(hidden, chunk)
    partial, coefficients = _partial(hidden, vocab, chunk), hidden.new_empty(3, n, dtype=torch.float32)
    options = (None if row_weight is None else row_weight.contiguous(), z_loss, smoothing)
    for first in range(0, max(n, 1), chunk):  # at least once, because that writes all of grad_weight
        _gather(hidden, rows, kept, count, first, x)
        _logits(x, weight, logits, partial, kept, labels, count, first, softcap, 0, statistics)
        _combine(partial, kept, count, first, chunk, vocab, statistics, coefficients, *options)
        if not any(needs):
            continue
        _gradient(logits, vocab, kept, labels, count, first, softcap, statistics, coefficients)
        if needs[0] and not keep:
            _matmul.matmul(logits, weight, grad_rows, index=kept, along="M", count=count, count_along="M", first=first)
        if needs[1] and not keep:
            _matmul.matmul(logits.T, x, grad_weight, count=count, count_along="K", first=first, accumulate=first > 0)


def finish(factor, hidden, weight, rows, statistics, kept_logits, needs):
    """Gradients of hidden (T, H) and weight (V, H) from those of the logits that `loss_pass` kept, times factor; rounded once."""
    gradient = kept_logits.view(hidden.dtype)
    kept, count = _compact(statistics[4], 0.0)  # Σ exp is 0 only where nothing is supervised
    grad_hidden, grad_weight = _common.absent(hidden), _common.absent(weight)
    if needs[0]:
        found = hidden.new_zeros(rows.shape[0], hidden.shape[1])
        _matmul.matmul(gradient, weight, found, index=kept, along="M", count=count, count_along="M", factor=factor)
        grad_hidden = found if rows.shape[0] == hidden.shape[0] else hidden.new_zeros(hidden.shape).index_copy_(0, rows, found)
    if needs[1]:
        grad_weight, x = weight.new_empty(weight.shape), _x_buffer(hidden, max(1, rows.shape[0]))
        _gather(hidden, rows, kept, count, 0, x)
        _matmul.matmul(gradient.T, x[: rows.shape[0]], grad_weight, count=count, count_along="K", factor=factor)
    return grad_hidden, grad_weight


def rows_statistics(hidden, weight, labels, ignore_index, softcap, vocab_start):
    """→ statistics (5, T) of the supervised rows, 0 elsewhere."""
    statistics = hidden.new_zeros(5, labels.shape[0], dtype=torch.float32)
    labels = labels.contiguous()
    kept, count = _compact(labels, ignore_index)
    chunk = _statistics_rows(labels.shape[0])
    x, partial = _x_buffer(hidden, chunk), _partial(hidden, weight.shape[0], chunk)
    for first in range(0, labels.shape[0], chunk):
        _gather(hidden, None, kept, count, first, x)
        _logits(x, weight, None, partial, kept, labels, count, first, softcap, vocab_start, statistics)
        _combine(partial, kept, count, first, chunk, weight.shape[0], statistics, None, None, 0.0, 0.0)
    return statistics


def rows_gradient(grad, hidden, weight, labels, statistics, ignore_index, softcap, vocab_start, needs):
    """Gradients of hidden and weight from those of lse, target and sum, grad[:3] (3, T): logits are made again by columns."""
    (T, H), V = hidden.shape, weight.shape[0]
    grad_weight = weight.new_empty(weight.shape) if needs[1] else _common.absent(weight)
    grad_rows = hidden.new_empty(T if needs[0] else 0, H, dtype=torch.float32)
    labels = labels.contiguous()
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
    """max, Σ exp(l − max) and Σ l of each row in each half tile of columns."""
    return hidden.new_empty(3, triton.cdiv(vocab, _tile(hidden).n // 2), rows, dtype=torch.float32)


def _tile(tensor, gradient=False):
    return _matmul.tile_for(tensor.dtype, _launch.capability(tensor.device), _kind(gradient))


def _kind(gradient):
    """What follows the product of logits that become their gradient at once needs registers that a wide tile has not left."""
    return "narrow" if gradient else "wide"


def _compact(labels, ignore_index):
    n = labels.shape[0]
    kept, count = (torch.empty(size, dtype=torch.int32, device=labels.device) for size in (max(n, 1), 1))
    compact_kernel[(1,)](labels, kept, count, n, ignore_index, BLOCK=_COMPACT, num_warps=8)
    return kept, count


def _gather(hidden, rows, kept, count, first, x):
    (BLOCK_M, BLOCK_H), (chunk, H) = _GATHER, x.shape
    if H and hidden.shape[0]:
        gather_kernel[(triton.cdiv(chunk, BLOCK_M), triton.cdiv(H, BLOCK_H))](
            hidden, rows, kept, count, first, x, hidden.shape[0], chunk, H, hidden.stride(0), ROWS=rows is not None,
            BLOCK_M=BLOCK_M, BLOCK_H=BLOCK_H, num_warps=4,
        )  # fmt: skip


def _logits(x, weight, logits, partial, kept, labels, count, first, softcap, vocab_start, statistics, coefficients=None):
    tile, (V, H), chunk = _tile(x, coefficients is not None), weight.shape, x.shape[0]
    grid = _launch.programs(x.device, triton.cdiv(chunk, tile.m) * triton.cdiv(V, tile.n), tile.per_sm)
    a, b, described = _matmul.operands(x, weight, tile)
    logits_kernel[(grid,)](
        a, b, logits, partial, kept, labels, count, first, statistics, coefficients, softcap, vocab_start, chunk, V, H,
        labels.shape[0], weight.stride(0), 0 if logits is None else logits.stride(0), 0 if partial is None else partial.shape[2],
        CAP=softcap > 0.0, STORE=logits is not None, GRADIENT=coefficients is not None, EVEN_K=H % tile.k == 0, **described,
        **_matmul.blocks(x.dtype, tile), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _combine(partial, kept, count, first, chunk, V, statistics, coefficients, row_weight, z_loss, smoothing):
    BLOCK_M, BLOCK_T = _COMBINE
    combine_kernel[(triton.cdiv(chunk, BLOCK_M),)](
        partial, kept, count, first, statistics, coefficients, row_weight, z_loss, smoothing, partial.shape[1], chunk, V,
        statistics.shape[1], partial.shape[2], COEFFICIENTS=coefficients is not None, WEIGHT=row_weight is not None,
        BLOCK_M=BLOCK_M, BLOCK_T=BLOCK_T, num_warps=4,
    )  # fmt: skip


def _gradient(logits, V, kept, labels, count, first, softcap, statistics, coefficients):
    (BLOCK_M, BLOCK_V), chunk = _GRADIENT, logits.shape[0]
    grid = _launch.programs(logits.device, triton.cdiv(chunk, BLOCK_M) * triton.cdiv(V, BLOCK_V), 8)
    gradient_kernel[(grid,)](
        logits, kept, labels, count, first, statistics, coefficients, softcap, chunk, V, labels.shape[0], logits.stride(0),
        CAP=softcap > 0.0, BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, num_warps=4,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------------- compiling


def compile_specs():
    """What `make cuda-check` compiles."""
    for capability in CAPABILITIES:
        yield from _row_specs(capability)
        for dtype in (torch.bfloat16, torch.float32):
            yield from _product_specs(capability, dtype)


def _row_specs(capability):
    def make(name, kernel, types, unaligned, constexprs, warps=4):
        return spec(f"linear_cross_entropy {name}", kernel, capability, types, constexprs, warps=warps, unaligned=unaligned.split())

    rows = "kept count"
    types = {"*i64": "labels", "*i32": rows, "i32": "n ignore_index"}
    yield make("compact", compact_kernel, types, "n ignore_index", {"BLOCK": _COMPACT}, 8)
    types = {"*bf16": "hidden x", "*i64": "rows", "*i32": rows, "i32": "first T chunk H stride"}
    yield make("gather", gather_kernel, types, "T", {"ROWS": True, "BLOCK_M": _GATHER[0], "BLOCK_H": _GATHER[1]})
    types = {
        "*fp32": "partial statistics coefficients row_weight", "*i32": rows, "fp32": "z_loss smoothing",
        "i32": "first tiles chunk V n partial_rows",
    }  # fmt: skip
    sizes = {"BLOCK_M": _COMBINE[0], "BLOCK_T": _COMBINE[1]}
    yield make("combine", combine_kernel, types, "n tiles", {"COEFFICIENTS": True, "WEIGHT": True} | sizes)
    types = {
        "*bf16": "logits", "*i32": rows, "*i64": "labels", "*fp32": "statistics coefficients", "fp32": "softcap",
        "i32": "first chunk V n stride_l",
    }  # fmt: skip
    yield make("gradient", gradient_kernel, types, "n", {"CAP": True, "BLOCK_M": _GRADIENT[0], "BLOCK_V": _GRADIENT[1]})
    types = {"*fp32": "grad_rows exp_sum factor", "*i64": "rows", "*bf16": "out", "i32": "n T H"}
    sizes = {"BLOCK_M": _SCALE[0], "BLOCK_H": _SCALE[1]}
    yield make("scaled rows", scaled_rows_kernel, types, "n T", {"ROWS": True, "FACTOR": True} | sizes)


def _product_specs(capability, dtype):
    kind, tile = _matmul.TYPES[dtype], _matmul.tile_for(dtype, capability)
    variants = [("logits", False, False, True), ("logits, softcap", True, False, True), ("logits again", True, True, True)]
    if tile.tma:
        variants.append(("logits by pointers", False, False, False))
    for name, cap, gradient, tma in variants:
        tile = _matmul.tile_for(dtype, capability, _kind(gradient))
        x_type, w_type, described = _matmul.operand_types(kind, tile, "k", "k", tma)
        types = {x_type: "x", "*i32": "kept count", "*i64": "labels", "fp32": "softcap"}
        types["i32"] = "first vocab_start chunk V H n stride_w stride_l partial_rows"
        for more, names in ((w_type, "w"), (f"*{kind}", "logits"), ("*fp32", "partial statistics coefficients")):
            types[more] = types.get(more, "") + " " + names
        constexprs = {"CAP": cap, "STORE": True, "GRADIENT": gradient, "EVEN_K": True} | described | _matmul.blocks(dtype, tile)
        yield spec(
            f"linear_cross_entropy {name} {kind}", logits_kernel, capability, types, constexprs, warps=tile.warps, stages=tile.stages,
            matrix=dtype != torch.float32, unaligned=("n",),
        )  # fmt: skip
    rows = {"a_dense": "k", "b_dense": "n", "along": "M", "count_along": "M"}
    yield _matmul.matmul_spec("linear_cross_entropy grad hidden", capability, dtype, **rows)
    weight = {"a_dense": "m", "b_dense": "n", "count_along": "K"}
    yield _matmul.matmul_spec("linear_cross_entropy grad weight", capability, dtype, **weight)
    if tile.tma:
        yield _matmul.matmul_spec("linear_cross_entropy grad weight by pointers", capability, dtype, tma=False, **weight)
    yield _matmul.matmul_spec("linear_cross_entropy grad weight, added", capability, dtype, accumulate=True, **weight)
    yield _matmul.matmul_spec("linear_cross_entropy grad hidden at once", capability, dtype, c_dtype=dtype, factor=True, **rows)
    yield _matmul.matmul_spec("linear_cross_entropy grad weight at once", capability, dtype, c_dtype=dtype, factor=True, **weight)
