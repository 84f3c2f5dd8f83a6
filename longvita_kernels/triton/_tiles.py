"""Device functions of the attention kernels: which document a tile lies in, what it sees, how it is loaded, how far a score is capped.

Documents are cut into tiles of BLOCK rows. Tile slots are numbered so that document d begins at slot cu[d] // BLOCK + d: every tile of
every document has a slot, total // BLOCK + n_docs slots are enough, and the host knows that number without reading cu_seqlens. Slots that
no tile falls on are empty tiles. Offsets are clamped to the tokens that there are: wrong ones give wrong numbers, never a wrong address.
"""

import triton
import triton.language as tl

from longvita_kernels.triton import _launch

INTERPRETED = tl.constexpr(_launch.INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Arguments that change from batch to batch: no kernel is compiled anew for their values.
COUNTS = (
    "n_docs",
    "queries",
    "keys",
    "rows",
    "columns",
    "tokens",
    "steps",
    "slots",
    "items",
    "turns",
    "left",
    "right",
    "batch",
    "capacity",
    "blocks",
    "table_stride",
)


_UNLIMITED = 1 << 30  # a window wider than any document


def window(left, right):
    """(left, right) as kernels take them: −1, no limit, as one wider than any document."""
    return tuple(min(_UNLIMITED, side) if side >= 0 else _UNLIMITED for side in (left, right))


def scales(scale, softcap):
    """(scale2, cap): a score in units of log 2 = scale2 · x, with x = q·k, or tanh(cap · q·k)."""
    return (softcap * LOG2E.value, scale / softcap) if softcap > 0 else (scale * LOG2E.value, 0.0)


@triton.jit
def bounded(ptr, index, low, high):
    """ptr[index], at least low and at most high."""
    return tl.minimum(tl.maximum(tl.load(ptr + index), low), high)


@triton.jit
def document_of(slot, cu_ptr, n_docs, total, steps, BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr = 1):
    """The document that a tile slot (or a vector of slots) belongs to, by binary search; 2 ** steps > n_docs.

    PER_TOKEN: rows of a tile that a token stands for."""
    low = slot * 0
    high = low + n_docs - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        first_slot = bounded(cu_ptr, middle, 0, total) * PER_TOKEN // BLOCK + middle
        low = tl.where(first_slot <= slot, middle, low)
        high = tl.where(first_slot <= slot, high, middle - 1)
    return low


@triton.jit
def extent(document, cu_ptr, total):
    """(first token, tokens) of a document."""
    start = bounded(cu_ptr, document, 0, total)
    return start, bounded(cu_ptr, document + 1, start, total) - start


@triton.jit
def first_row(slot, document, start, BLOCK: tl.constexpr):
    """First row of a slot's tile, counted inside its document (beyond its end: an empty tile)."""
    return tl.maximum(slot - start // BLOCK - document, 0) * BLOCK


@triton.jit
def visible_range(first, last, offset, left, right, length):
    """Columns low ≤ j < high of `length` that any row in first … last sees; row i sees i + offset − left … i + offset + right."""
    low = tl.maximum(first + offset - left, 0)
    return low, tl.maximum(tl.minimum(last + offset + right + 1, length), low)


@triton.jit
def full_range(first, last, offset, left, right, length, low, high, BLOCK: tl.constexpr):
    """(begin, a, b): columns from begin to a and from b on need a mask, those between a and b are seen by every row in first … last.

    begin, a and b are multiples of BLOCK."""
    begin = low // BLOCK * BLOCK
    a = tl.cdiv(tl.maximum(last + offset - left, 0), BLOCK) * BLOCK
    a = tl.maximum(tl.minimum(a, tl.cdiv(high, BLOCK) * BLOCK), begin)
    b = tl.maximum(tl.minimum(first + offset + right + 1, length), 0) // BLOCK * BLOCK
    return begin, a, tl.maximum(a, b)


@triton.jit
def tile_of(item, heads, order_ptr, cu_rows_ptr, cu_columns_ptr, n_docs, rows, columns, steps, BLOCK: tl.constexpr):
    """Of a piece of work: its head; first token and tokens of the document, of rows and of columns; the tile's first row in it."""
    slot, head = tl.load(order_ptr + item // heads).to(tl.int32), (item % heads).to(tl.int64)
    document = document_of(slot, cu_rows_ptr, n_docs, rows, steps, BLOCK)
    start, length = extent(document, cu_rows_ptr, rows)
    start_columns, length_columns = extent(document, cu_columns_ptr, columns)
    return head, start, length, start_columns, length_columns, first_row(slot, document, start, BLOCK)


@triton.jit
def seen_by(first, length, offset, left, right, columns, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """(begin, a, b, high): the columns that a tile sees, by blocks of STEP: those of `full_range`, and their end."""
    last = tl.minimum(first + BLOCK, length) - 1
    low, high = visible_range(first, last, offset, left, right, columns)
    begin, a, b = full_range(first, last, offset, left, right, columns, low, high, STEP)
    return begin, a, b, high


@triton.jit
def block_count(begin, a, b, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Blocks of columns that need a mask, or those that do not (between a and b)."""
    return (a - begin) // BLOCK + tl.maximum(tl.cdiv(end - b, BLOCK), 0) if MASKED else (b - a) // BLOCK


@triton.jit
def block_start(number, begin, a, b, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """First column of one of those blocks. Both ends go through one masked loop: a second copy of it costs registers."""
    start = (begin if MASKED else a) + number * BLOCK
    return tl.where(start < a, start, start - a + b) if MASKED else start


@triton.jit
def multipliable(values):
    """The values, in float32 where the interpreter would multiply the bit patterns of bfloat16."""
    return values.to(tl.float32) if INTERPRETED and values.dtype == tl.bfloat16 else values


@triton.jit
def load_rows(ptr, first, stride, length, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows first, first + 1, … of DIM elements as (ROWS, BLOCK_DIM), zeros beyond; MASKED: also from row `length` on, which is not read.

    Addresses inside a tile are 32-bit: launchers see to it that ROWS · stride fits."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    at = ptr + tl.cast(first, tl.int64) * stride + (row * stride + column)
    if MASKED:
        values = tl.load(at, mask=(row < length - first) & (column < DIM), other=0.0)
    elif DIM != BLOCK_DIM:
        values = tl.load(at, mask=column < DIM, other=0.0)
    else:
        values = tl.load(at)
    return multipliable(values)


@triton.jit
def store_rows(ptr, values, first, stride, length, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ADD: tl.constexpr):
    """Write (ROWS, BLOCK_DIM) in the tensor's dtype; ADD: on top of what stands there, in float32."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    at = ptr + tl.cast(first, tl.int64) * stride + (row * stride + column)
    mask = (row < length - first) & (column < DIM)
    if ADD:
        values += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def tanh(x):
    """By exp: its error is absolute (1e-7), like that of a score. exp(2x) may be inf or 0: ±1."""
    return 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)


@triton.jit(do_not_specialize=COUNTS)
def cost_kernel(
    cost_ptr, cu_rows_ptr, cu_columns_ptr, n_docs, rows, columns, steps, slots, left, right, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """How many columns the tile in each slot sees: its share of the work, by which tiles are ordered."""
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    document = document_of(slot, cu_rows_ptr, n_docs, rows, steps, BLOCK)
    start, length = extent(document, cu_rows_ptr, rows)
    _, seen = extent(document, cu_columns_ptr, columns)
    first = first_row(slot, document, start, BLOCK)
    low, high = visible_range(first, tl.minimum(first + BLOCK, length) - 1, seen - length, left, right, seen)
    tl.store(cost_ptr + slot, tl.where(first < length, high - low, 0), mask=slot < slots)


@triton.jit
def work_item(turn, items):
    """Which piece of work this program takes in its turn: back and forth, so that nobody always gets the longer of two."""
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    return turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)
