"""The key/value cache on Triton, as append_kv and decode_attention share it: where a token lies, and 8-bit codes.

Layouts: ops/_cache.py. float8_e4m3fn caches come as uint8 and are coded here, bit by bit: sm_80 has no instruction for that format.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def cache_row(sequence, position, table_ptr, table_stride, blocks, block_size, inside, PAGED: tl.constexpr):
    """(block, token in it) of a position of a sequence's cache; block −1 where the table names one that does not exist."""
    if PAGED:
        block = tl.load(table_ptr + sequence.to(tl.int64) * table_stride + position // block_size, mask=inside, other=0)
        block = tl.where((block >= 0) & (block < blocks), block, -1)
        slot = position % block_size
    else:
        block, slot = position * 0 + sequence, position
    return block.to(tl.int64), slot.to(tl.int64)


@triton.jit
def from_float8(codes, NATIVE: tl.constexpr):
    """float8_e4m3fn (as uint8) → float16, exactly: the same bits with an exponent bias of 15 instead of 7."""
    if NATIVE:
        result = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        wide = codes.to(tl.int16)
        value = (((wide & 0x7F) << 7) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
        result = tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)
    return result


@triton.jit
def to_float8(x):
    """float32, at most 448 in size → float8_e4m3fn (as uint8), ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below 2⁻⁶ codes are multiples of 2⁻⁹: adding 2²³ units rounds to them
    small = (tl.abs(x) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantise(x, FP8: tl.constexpr):
    """Rows (R, D), float32 → codes and their scales (R,): the largest magnitude of a row becomes the largest code."""
    top: tl.constexpr = 448.0 if FP8 else 127.0
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([x.shape[0]], top, tl.float32))
    divisor = tl.where(scale > 0, scale, 1.0)[:, None] + tl.zeros_like(x)
    codes = tl.minimum(tl.maximum(tl.div_rn(x, divisor), -top), top)
    if FP8:
        result = to_float8(codes)
    else:
        result = ((codes + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 · 2²³: rounds to whole numbers, ties to even
    return result, scale


def as_bits(cache):
    """fp8 as uint8, everything else as it is."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
