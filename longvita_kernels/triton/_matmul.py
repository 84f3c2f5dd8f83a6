"""The matrix product under the vocabulary-head ops, with what torch.mm lacks: rows read and written through an index, a number of rows
that only the device knows, float32 results, adding to what is there.

    c[m, n] (+)= Σ_k a[m, k] · b[k, n]        any strides; sums in float32

Persistent: the programs take the tiles of the result in turn, so that a product of few rows out of many costs what few rows cost.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from longvita_kernels.triton import _launch
from longvita_kernels.triton._compile import spec

INTERPRETED = tl.constexpr(_launch.INTERPRETED)


class Tile(NamedTuple):
    """Part of the result that a program makes at a time, the step along the sum, and how it is launched.

    tma: operands that are laid out for it come as whole blocks through the tensor memory accelerator: half the instructions of a main loop.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    per_sm: int = 1
    tma: bool = False


# By capability (0: the interpreter; any blocks do). Wide: on Hopper the tile whose operands stream at full rate, and as many stages as
# shared memory holds; on Ampere half of it. Narrow: where so much follows the product that a wide tile would spill. Thin: few columns
# (rows of a decoding step), bound by reading `a` once, so deep rather than wide. float32 is multiplied as three TF32 products. 86 (and 89)
# and 120 have 99 KiB of shared memory.
_SMALL = Tile(64, 64, 64, 4, 1)
_TILES = {
    ("wide", 16): {
        0: _SMALL._replace(tma=True),
        80: Tile(128, 128, 64, 8, 3),
        86: Tile(128, 128, 32, 8, 3),
        90: Tile(128, 256, 64, 8, 4, tma=True),
        100: Tile(128, 256, 64, 8, 3, tma=True),
    },
    ("narrow", 16): {0: _SMALL, 80: Tile(128, 128, 32, 8, 4), 90: Tile(128, 128, 64, 8, 4)},
    ("thin", 16): {0: Tile(64, 16, 64, 4, 1), 80: Tile(64, 16, 64, 4, 5, 3), 90: Tile(128, 16, 128, 4, 4)},
    ("wide", 32): {0: _SMALL, 80: Tile(64, 64, 32, 4, 3, 2)},
    ("narrow", 32): {0: _SMALL, 80: Tile(64, 64, 32, 4, 3, 2)},
    ("thin", 32): {0: Tile(64, 16, 64, 4, 1), 80: Tile(64, 16, 32, 4, 4, 4)},
}
for _table in _TILES.values():
    _table[120] = _launch.by_capability(_table, 86)
THIN = 16  # columns up to which a product is thin


def tile_for(dtype, capability, kind="wide"):
    """Blocks of a product of this dtype: "wide", "narrow" or "thin"."""
    return _launch.by_capability(_TILES[kind, 32 if dtype == torch.float32 else 16], capability)


def kind_for(columns, count_along=""):
    """The kind of product that gives so many columns. Where the device knows how long the sum is, operands end in zeros up to a multiple of
    64, which the deep steps of a thin product would overrun."""
    return "thin" if columns <= THIN and count_along != "K" else "wide"


def blocks(dtype, tile):
    """The constexprs that every product takes."""
    precision = "tf32x3" if dtype == torch.float32 else "tf32"  # for 16 bits there is one way
    return {"PRECISION": precision, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a · b + acc. The interpreter multiplies the bit patterns of bfloat16, so there it gets float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in `dtype`, to nearest even. The interpreter would cut off the lower half for bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def half(acc, which: tl.constexpr):
    """Left (0) or right (1) half of a tile: what follows a product goes half by half, because all at once would not fit into registers."""
    left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))
    return left if which == 0 else right


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, in an order that keeps GROUP rows of tiles in L2 while all columns pass."""
    in_group = GROUP * tiles_n
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def multiply(acc, a_MK, b_KN, ok_M, ok_N, K, step_a, step_b, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr):
    """acc + Σ a · b along K. a_MK, b_KN: pointers to the first blocks; step: elements between neighbours along K; what is not ok is 0."""
    k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_MK, mask=ok_M[:, None], other=0.0)
            b = tl.load(b_KN, mask=ok_N[None, :], other=0.0)
        else:
            a = tl.load(a_MK, mask=ok_M[:, None] & (k[None, :] < K - start), other=0.0)
            b = tl.load(b_KN, mask=ok_N[None, :] & (k[:, None] < K - start), other=0.0)
        acc = dot(a, b, acc, PRECISION)
        a_MK += step_a * BLOCK_K
        b_KN += step_b * BLOCK_K
    return acc


@triton.jit
def multiply_blocks(acc, a, b, m, n, K, TMA_A: tl.constexpr, TMA_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """The same of blocks that begin at row m of a (M, K) and n of b (N, K), given as tensor descriptors: zeros beyond the ends."""
    for start in range(0, K, BLOCK_K):
        left = a.load([m, start]) if TMA_A == "k" else a.load([start, m]).T
        right = b.load([n, start]).T if TMA_B == "k" else b.load([start, n])
        acc = dot(left, right, acc, PRECISION)
    return acc


def operands(a_MK, b_NK, tile):
    """(a, b, constexprs) as `multiply_blocks` takes them where the tile uses tensor descriptors and both are laid out for it, else as they
    are. Which dimension is dense, "k" or "r", the rows, says whether a descriptor is of the operand or of its transpose."""
    found = [_descriptor(x, rows, tile.k) for x, rows in ((a_MK, tile.m), (b_NK, tile.n))] if tile.tma else [None]
    if None in found:
        return a_MK, b_NK, {"TMA_A": "", "TMA_B": ""}
    return found[0][0], found[1][0], {"TMA_A": found[0][1], "TMA_B": found[1][1]}


def _descriptor(x_RK, rows, k):
    """(tensor descriptor, dense dimension); None where rows do not begin at multiples of 16 bytes."""
    for dense, view, block in (("k", x_RK, [rows, k]), ("r", x_RK.T, [k, rows])):
        if view.stride(1) == 1 and view.stride(0) * view.element_size() % 16 == 0 and view.data_ptr() % 16 == 0 and view.numel():
            return TensorDescriptor.from_tensor(view, block), dense
    return None


@triton.jit
def device_rows(count, first, most):
    """How many of the rows first … first + most − 1 exist when there are `count` (on the device) in all."""
    return tl.maximum(tl.minimum(tl.load(count) - first, most), 0).to(tl.int32)


@triton.jit
def matmul_kernel(
    a, b, c, index, index_limit, count, first, factor, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    INDEX: tl.constexpr, COUNT: tl.constexpr, ACCUMULATE: tl.constexpr, FACTOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA_A: tl.constexpr, TMA_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """INDEX: which dimension goes through `index`, clamped to its limit: "N" or "K" of b, "M" of c, or "". COUNT: which of M and K the
    device knows better: row `first` of the problem is row 0 of a; where it is K, a and b hold zeros up to the next multiple of 64, as
    far as they go. FACTOR: c is multiplied by what `factor` points to."""
    if COUNT == "M":
        M = device_rows(count, first, M)
    if COUNT == "K":
        K = tl.minimum(tl.cdiv(device_rows(count, first, K), BLOCK_K) * BLOCK_K, K)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    if ACCUMULATE:
        tiles = tl.where(K > 0, tiles, 0)
    stride_am, stride_ak = tl.cast(stride_am, tl.int64), tl.cast(stride_ak, tl.int64)
    stride_bk, stride_bn = tl.cast(stride_bk, tl.int64), tl.cast(stride_bn, tl.int64)
    stride_cm, stride_cn = tl.cast(stride_cm, tl.int64), tl.cast(stride_cn, tl.int64)
    k = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, 8)
        m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ok_M, ok_N = m < M, n < N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA_A == "":
            a_MK = a + m[:, None] * stride_am + k[None, :] * stride_ak
        if TMA_A != "":
            acc = multiply_blocks(acc, a, b, tile_m * BLOCK_M, tile_n * BLOCK_N, K, TMA_A, TMA_B, BLOCK_K, PRECISION)
        elif INDEX == "K":
            for start in range(0, K, BLOCK_K):
                ok_K = k < K - start
                row = tl.load(index + start + k, mask=ok_K, other=0)
                row = tl.minimum(tl.maximum(row, 0), index_limit - 1).to(tl.int64)
                left = tl.load(a_MK, mask=ok_M[:, None] & ok_K[None, :], other=0.0)
                right = tl.load(b + row[:, None] * stride_bk + n[None, :] * stride_bn, mask=ok_N[None, :] & ok_K[:, None], other=0.0)
                acc = dot(left, right, acc, PRECISION)
                a_MK += stride_ak * BLOCK_K
        else:
            column = n.to(tl.int64)
            if INDEX == "N":
                column = tl.load(index + n, mask=ok_N, other=0)
                column = tl.minimum(tl.maximum(column, 0), index_limit - 1).to(tl.int64)
            b_KN = b + k[:, None] * stride_bk + column[None, :] * stride_bn
            acc = multiply(acc, a_MK, b_KN, ok_M, ok_N, K, stride_ak, stride_bk, BLOCK_K, EVEN_K, PRECISION)
        target = m.to(tl.int64)
        if INDEX == "M":
            target = tl.load(index + first + m, mask=ok_M, other=0).to(tl.int64)
        for side in tl.static_range(2):
            n = tile_n * BLOCK_N + side * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            c_MN = c + target[:, None] * stride_cm + n[None, :] * stride_cn
            ok_MN = ok_M[:, None] & (n < N)[None, :]
            value = half(acc, side)
            if FACTOR:
                value *= tl.load(factor)
            if ACCUMULATE:
                value += tl.load(c_MN, mask=ok_MN, other=0.0)
            tl.store(c_MN, rounded(value, c.dtype.element_ty), mask=ok_MN)


def _stages(tile, along):
    """An index along K is loaded ahead of what it points to, which takes two of the stages."""
    return tile.stages + 2 * (along == "K")


def matmul(a_MK, b_KN, c_MN, *, index=None, along="", count=None, count_along="", first=0, accumulate=False, factor=None):
    """c (+)= a · b. Shapes tell M, N and K, except that the dimension of b that goes through `index` is as long as the index.

    index, along       (n,) integers and the dimension that they stand for: "N" or "K" of b, "M" of c
    count, count_along one int32 on the device, and the dimension, "M" or "K", of which only entries first … count−1 exist
    factor             one float32 on the device that the product is multiplied with
    """
    (M, K), N = a_MK.shape, c_MN.shape[1]
    if M == 0 or N == 0:
        return
    tile = tile_for(a_MK.dtype, _launch.capability(a_MK.device), kind_for(N, count_along))
    none = a_MK  # stands for a pointer that is not used
    limit = {"N": b_KN.shape[1], "K": b_KN.shape[0]}.get(along, 0)
    grid = _launch.programs(a_MK.device, triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n), tile.per_sm)
    a, b, described = operands(a_MK, b_KN.T, tile._replace(tma=tile.tma and along not in ("N", "K")))
    matmul_kernel[(grid,)](
        a, b if described["TMA_B"] else b_KN, c_MN, none if index is None else index, limit, none if count is None else count, first,
        none if factor is None else factor, M, N, K,
        *a_MK.stride(), *b_KN.stride(), *c_MN.stride(),
        INDEX=along, COUNT=count_along, ACCUMULATE=accumulate, FACTOR=factor is not None, EVEN_K=K % tile.k == 0, **described,
        **blocks(a_MK.dtype, tile), num_warps=tile.warps, num_stages=_stages(tile, along),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------------- compiling


TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def operand_types(kind, tile, a_dense, b_dense, tma=True):
    """Types of a and b as `operands` gives them, and its constexprs; a_dense, b_dense: "k", or another letter for rows."""
    if not (tma and tile.tma):
        return f"*{kind}", f"*{kind}", {"TMA_A": "", "TMA_B": ""}
    sides = [("k" if dense == "k" else "r", rows) for dense, rows in ((a_dense, tile.m), (b_dense, tile.n))]
    blocks = [[rows, tile.k] if dense == "k" else [tile.k, rows] for dense, rows in sides]
    return *(f"tensordesc<{kind}{block}>" for block in blocks), {"TMA_A": sides[0][0], "TMA_B": sides[1][0]}


def matmul_spec(name, capability, dtype, *, a_dense, b_dense, c_dtype=torch.float32, c_dense="n", columns=1 << 30, along="", count_along="",
                accumulate=False, factor=False, even=True, tma=True):  # fmt: skip
    """CompileSpec of one use of `matmul_kernel`. a_dense, b_dense, c_dense: which dimension has stride 1. tma: where the tile has it."""
    tile, kind = tile_for(dtype, capability, kind_for(columns, count_along)), TYPES[dtype]
    strides = {"stride_am", "stride_ak", "stride_bk", "stride_bn", "stride_cm", "stride_cn"}
    dense = {f"stride_a{a_dense}", f"stride_b{b_dense}", f"stride_c{c_dense}"}
    index_kind = "*i64" if along in ("N", "K") else "*i32"
    described = operand_types(kind, tile, a_dense, b_dense, tma and along not in ("N", "K"))
    types = {described[0]: "a"}
    types[described[1]] = types.get(described[1], "") + " b"
    types |= {index_kind: "index", "i32": "index_limit first M N K " + " ".join(sorted(strides - dense))}
    c_kind = f"*{TYPES[c_dtype]}"
    types[c_kind] = types.get(c_kind, "") + " c"
    types["*i32"] = types.get("*i32", "") + " count"
    types["*fp32"] = types.get("*fp32", "") + " factor"
    constexprs = {stride: 1 for stride in dense}
    constexprs |= {"INDEX": along, "COUNT": count_along, "ACCUMULATE": accumulate, "FACTOR": factor, "EVEN_K": even} | described[2]
    return spec(
        f"{name} {kind}", matmul_kernel, capability, types, constexprs | blocks(dtype, tile), warps=tile.warps, stages=_stages(tile, along),
        matrix=dtype != torch.float32, unaligned=("index_limit",),
    )  # fmt: skip
