"""New keys and values into a cache on Triton, quantised on the way where the cache has 8 bits (equations: ops/append_kv.py).

A program takes R rows, a row being one token and KV head. A position outside the cache, or in a block that does not exist, is not written.
"""

import torch
import triton
import triton.language as tl

from longvita_kernels.triton import _launch
from longvita_kernels.triton._compile import CAPABILITIES, CompileSpec
from longvita_kernels.triton._kv_cache import as_bits, cache_row, quantise
from longvita_kernels.triton._tiles import COUNTS, bounded

_ROWS = 8


@triton.jit
def _sequence_of(token, cu_ptr, batch, tokens, steps):
    """The last sequence that begins at or before a token; 2 ** steps > batch."""
    low = token * 0
    high = low + batch - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begun = bounded(cu_ptr, middle, 0, tokens) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    return low


@triton.jit
def _write(
    x_ptr, x_stride, x_head, cache_ptr, cache_block, cache_stride, cache_head, scale_ptr, scale_block, scale_stride, scale_head,
    token, head, block, slot, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, QUANTISED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_DIM)[None, :]
    mask = inside[:, None] & (column < DIM)
    x = tl.load(x_ptr + (token.to(tl.int64) * x_stride + head * x_head)[:, None] + column, mask=mask, other=0.0)
    at = cache_ptr + (block * cache_block + slot * cache_stride + head * cache_head)[:, None] + column
    if QUANTISED:
        codes, scale = quantise(x.to(tl.float32), FP8)
        tl.store(at, codes, mask=mask)
        tl.store(scale_ptr + block * scale_block + slot * scale_stride + head * scale_head, scale, mask=inside)
    else:
        tl.store(at, x.to(tl.float32).to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def append_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, cu_q_ptr, lengths_ptr, table_ptr,
    k_stride, k_head, v_stride, v_head, k_cache_block, k_cache_stride, k_cache_head, v_cache_block, v_cache_stride, v_cache_head,
    k_scale_block, k_scale_stride, k_scale_head, v_scale_block, v_scale_stride, v_scale_head,
    tokens, batch, steps, capacity, table_stride, blocks, block_size,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, R: tl.constexpr, PAGED: tl.constexpr, QUANTISED: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    token, head = (row // HEADS).to(tl.int32), row % HEADS
    sequence = _sequence_of(token, cu_q_ptr, batch, tokens, steps)
    fresh = token - bounded(cu_q_ptr, sequence, 0, tokens)
    position = bounded(lengths_ptr, sequence, 0, capacity) + fresh
    inside = (token < tokens) & (token < tl.load(cu_q_ptr + sequence + 1)) & (fresh >= 0) & (position < capacity)
    block, slot = cache_row(sequence, position, table_ptr, table_stride, blocks, block_size, inside, PAGED)
    inside = inside & (block >= 0)
    _write(
        k_ptr, k_stride, k_head, k_cache_ptr, k_cache_block, k_cache_stride, k_cache_head, k_scale_ptr, k_scale_block, k_scale_stride,
        k_scale_head, token, head, block, slot, inside, DIM, BLOCK_DIM, QUANTISED, FP8,
    )  # fmt: skip
    _write(
        v_ptr, v_stride, v_head, v_cache_ptr, v_cache_block, v_cache_stride, v_cache_head, v_scale_ptr, v_scale_block, v_scale_stride,
        v_scale_head, token, head, block, slot, inside, DIM, BLOCK_DIM, QUANTISED, FP8,
    )  # fmt: skip


def append(k, v, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale):
    """Write k and v (T, Hkv, D) behind the cache_seqlens[b] tokens that sequence b has."""
    tokens, heads, dim = k.shape
    batch, paged, quantised = len(cache_seqlens), block_table is not None, k_scale is not None
    if tokens * heads * batch == 0:
        return
    k_bits, v_bits = as_bits(k_cache), as_bits(v_cache)
    scales = (k_scale, v_scale) if quantised else (k_bits, v_bits)
    append_kernel[(triton.cdiv(tokens * heads, _ROWS),)](
        k, v, k_bits, v_bits, *scales, cu_seqlens_q, cache_seqlens, block_table if paged else cache_seqlens,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *scales[0].stride()[:3], *scales[1].stride()[:3],
        tokens, batch, batch.bit_length(), k_cache.shape[1] * (block_table.shape[1] if paged else 1), block_table.stride(0) if paged else 0,
        k_cache.shape[0], k_cache.shape[1], HEADS=heads, DIM=dim, BLOCK_DIM=_launch.power_of_2(dim), R=_ROWS, PAGED=paged,
        QUANTISED=quantised, FP8=k_cache.dtype == torch.float8_e4m3fn, num_warps=4,
    )  # fmt: skip


def compile_specs():
    """What `make cuda-check` compiles."""
    for capability in CAPABILITIES:
        for label, cache, paged in (("bf16 rows", "*bf16", False), ("int8 paged", "*i8", True), ("fp8 rows", "*u8", False)):
            constexprs = {"HEADS": 8, "DIM": 128, "BLOCK_DIM": 128, "R": _ROWS, "PAGED": paged, "QUANTISED": cache != "*bf16"}
            constexprs |= {"FP8": cache == "*u8"}
            names = [name for name in append_kernel.arg_names if name not in constexprs]
            types = {"k_ptr": "*bf16", "v_ptr": "*bf16", "cu_q_ptr": "*i32", "lengths_ptr": "*i32", "table_ptr": "*i32"}
            types |= {name: cache for name in ("k_cache_ptr", "v_cache_ptr")}
            types |= {name: "*fp32" if constexprs["QUANTISED"] else cache for name in ("k_scale_ptr", "v_scale_ptr")}
            yield CompileSpec(
                name=f"append_kv, {label}", kernel=append_kernel, signature={name: types.get(name, "i32") for name in names},
                constexprs=constexprs, num_warps=4, num_stages=3, matrix=False, capability=capability,
                aligned=tuple(n for n in names if n.startswith(("k_", "v_")) and "scale" not in n),
            )  # fmt: skip
