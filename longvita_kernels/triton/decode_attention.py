"""Attention of the newest queries over the cache on Triton, split over the cache (equations: ops/decode_attention.py).

The rows of a tile are the queries of one sequence times the query heads of one KV group, so that a key is read once for all of them.
What a tile sees is cut into `splits` equal parts, each the work of one program; a second kernel combines them. The number of splits follows
from shapes alone and their bounds from the sequence: neither other sequences' lengths nor the run change a bit.
Scales of an 8-bit cache act on scores and weights; the codes themselves are exact in bf16 and fp16. M: rows, N: keys of a step.
"""

import torch
import triton
import triton.language as tl

from longvita_kernels.triton import _launch
from longvita_kernels.triton._compile import CAPABILITIES, CompileSpec
from longvita_kernels.triton._kv_cache import as_bits, cache_row, from_float8
from longvita_kernels.triton._launch import Blocks
from longvita_kernels.triton._tiles import (
    COUNTS,
    LN2,
    LOG2E,
    bounded,
    document_of,
    extent,
    first_row,
    multipliable,
    scales,
    tanh,
    visible_range,
    window,
    work_item,
)

# By capability and (bytes per element of q, D as a power of 2, whether sequences bring more than 16 rows).
BLOCKS = {
    80: {(2, 64, False): Blocks(16, 128, 4, 3, 4), (2, 128, False): Blocks(16, 64, 4, 3, 4), (2, 256, False): Blocks(16, 32, 4, 3, 2),
         (2, 64, True): Blocks(64, 64, 4, 2, 2), (2, 128, True): Blocks(64, 64, 8, 2, 1), (2, 256, True): Blocks(64, 32, 8, 1, 1),
         (4, 64, False): Blocks(16, 32, 4, 2, 4), (4, 128, False): Blocks(16, 16, 4, 2, 4), (4, 256, False): Blocks(16, 16, 8, 2, 2),
         (4, 64, True): Blocks(32, 32, 8, 2, 2), (4, 128, True): Blocks(32, 16, 8, 2, 2), (4, 256, True): Blocks(16, 16, 8, 2, 2)},
}  # fmt: skip
_MAX_SPLITS, _MIN_KEYS = 32, 256  # parts of a sequence at most, keys of a part at least
_PARTIAL_BYTES = 64 << 20  # what partial results may take


@triton.jit
def _codes(ptr, block, slot, block_stride, stride, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, FP8: tl.constexpr):
    """Keys or values (N, BLOCK_DIM) at their places in the cache."""
    column = tl.arange(0, BLOCK_DIM)[None, :]
    codes = tl.load(ptr + (block * block_stride + slot * stride)[:, None] + column, mask=inside[:, None] & (column < DIM), other=0)
    return from_float8(codes, FP8 == 2) if FP8 > 0 else codes


@triton.jit(do_not_specialize=COUNTS)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, cu_q_ptr, lengths_ptr, table_ptr,
    q_stride, q_head, k_block, k_stride, k_head, v_block, v_stride, v_head,
    k_scale_block, k_scale_stride, k_scale_head, v_scale_block, v_scale_stride, v_scale_head,
    tokens, batch, steps, items, turns, left, right, capacity, table_stride, blocks, block_size, scale2, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, MIN_KEYS: tl.constexpr, PAGED: tl.constexpr, QUANTISED: tl.constexpr, FP8: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """out (SPLITS, T, H, D) and lse (SPLITS, H, T) of each part, dense."""
    for turn in range(turns):
        item = work_item(turn, items)
        if item < items:
            split, kv_head, slot = item % SPLITS, item // SPLITS % (HEADS // GROUP), item // SPLITS // (HEADS // GROUP)
            sequence = document_of(slot, cu_q_ptr, batch, tokens, steps, M, GROUP)
            start, queries = extent(sequence, cu_q_ptr, tokens)
            first = first_row(slot, sequence, start * GROUP, M)
            if first < queries * GROUP:
                row = first + tl.arange(0, M)
                there = row < queries * GROUP
                query = row // GROUP
                token, head = (start + query).to(tl.int64), (kv_head * GROUP + row % GROUP).to(tl.int64)
                column = tl.arange(0, BLOCK_DIM)[None, :]
                mask = there[:, None] & (column < DIM)
                q = multipliable(tl.load(q_ptr + (token * q_stride + head * q_head)[:, None] + column, mask=mask, other=0.0))
                length = bounded(lengths_ptr, sequence, 0, capacity)
                offset = length - queries
                last = (tl.minimum(first + M, queries * GROUP) - 1) // GROUP
                low, high = visible_range(first // GROUP, last, offset, left, right, length)
                part = tl.maximum(tl.cdiv(tl.cdiv(high - low, SPLITS), N) * N, MIN_KEYS)
                begin, end = low + split * part, tl.minimum(low + split * part + part, high)
                peak, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
                acc = tl.zeros([M, BLOCK_DIM], tl.float32)
                at_kv = kv_head.to(tl.int64)
                for at in tl.range(begin, end, N):
                    key = at + tl.arange(0, N)
                    inside = key < end
                    block, place = cache_row(sequence, key, table_ptr, table_stride, blocks, block_size, inside, PAGED)
                    inside = inside & (block >= 0)
                    k = _codes(k_ptr + at_kv * k_head, block, place, k_block, k_stride, inside, DIM, BLOCK_DIM, FP8).to(q.dtype)
                    v = _codes(v_ptr + at_kv * v_head, block, place, v_block, v_stride, inside, DIM, BLOCK_DIM, FP8).to(q.dtype)
                    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
                    if QUANTISED:
                        scale_at = k_scale_ptr + at_kv * k_scale_head + block * k_scale_block + place * k_scale_stride
                        scores *= tl.load(scale_at, mask=inside, other=0.0)[None, :]
                    if SOFTCAP:
                        scores = tanh(scores * cap)
                    distance = key[None, :] - query[:, None] - offset
                    seen = (distance >= -left) & (distance <= right) & inside[None, :]
                    scores = tl.where(seen, scores * scale2, float("-inf"))
                    new_peak = tl.maximum(peak, tl.max(scores, 1))
                    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing seen yet
                    weights, shrink = tl.exp2(scores - base[:, None]), tl.exp2(peak - base)
                    total = total * shrink + tl.sum(weights, 1)
                    if QUANTISED:
                        scale_at = v_scale_ptr + at_kv * v_scale_head + block * v_scale_block + place * v_scale_stride
                        weights *= tl.load(scale_at, mask=inside, other=0.0)[None, :]
                    acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
                    peak = new_peak
                blind = total == 0
                safe = tl.where(blind, 1.0, total)
                lse = tl.where(blind, float("-inf"), (peak + tl.log2(safe)) * LN2)
                wide = split.to(tl.int64)
                tl.store(lse_ptr + (wide * HEADS + head) * tokens + token, lse, mask=there)
                out_at = out_ptr + ((wide * tokens + token) * HEADS + head)[:, None] * DIM + column
                tl.store(out_at, (acc / safe[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, tokens, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SPLITS: tl.constexpr
):
    """One row (token, head): the parts weighted by exp(lse of the part − lse)."""
    row = tl.program_id(0).to(tl.int64)
    token, head = row // HEADS, row % HEADS
    split, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DIM)[None, :]
    lse = tl.load(part_lse_ptr + (split * HEADS + head) * tokens + token)
    peak = tl.max(lse, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2((lse - base) * LOG2E)
    total = tl.sum(weights, 0)
    safe = tl.where(total == 0, 1.0, total)
    at = part_ptr + ((split * tokens + token) * HEADS + head)[:, None] * DIM + column
    part = tl.load(at, mask=(column < DIM) & (weights > 0)[:, None], other=0.0)
    out = tl.sum(part * (weights / safe)[:, None], 0)
    tl.store(lse_ptr + head * tokens + token, tl.where(total == 0, float("-inf"), base + tl.log2(safe) * LN2))
    column = tl.arange(0, BLOCK_DIM)
    tl.store(out_ptr + row * DIM + column, out.to(out_ptr.dtype.element_ty), mask=column < DIM)


# --------------------------------------------------------------------------------------------------------------------------------- launch


def decode(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale, left, right, softcap, scale):
    """out (T, H, D) in q's dtype and lse (H, T) float32; right is 0 for causal."""
    tokens, heads, dim = q.shape
    batch, kv_heads, paged, quantised = len(cache_seqlens), k_cache.shape[2], block_table is not None, k_scale is not None
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    if tokens * batch == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    group, block_dim = heads // kv_heads, _launch.power_of_2(dim)
    many = tokens * group > 16 * batch
    tile = _launch.blocks(BLOCKS, _launch.capability(q.device), (q.element_size(), max(64, block_dim), many))
    capacity = k_cache.shape[1] * (block_table.shape[1] if paged else 1)
    splits = _splits(capacity, tokens * heads * dim)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, tokens, heads, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, heads, tokens, dtype=torch.float32, device=q.device)
    k_bits, v_bits = as_bits(k_cache), as_bits(v_cache)
    factors = (k_scale, v_scale) if quantised else (k_bits, v_bits)
    items = (tokens * group // tile.m + batch) * kv_heads * splits
    programs = _launch.programs(q.device, items, tile.per_sm)
    shape = {"HEADS": heads, "DIM": dim, "BLOCK_DIM": block_dim, "SPLITS": splits}
    decode_kernel[(programs,)](
        q, k_bits, v_bits, *factors, part, part_lse, cu_seqlens_q, cache_seqlens, block_table if paged else cache_seqlens,
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *factors[0].stride()[:3], *factors[1].stride()[:3],
        tokens, batch, batch.bit_length(), items, triton.cdiv(items, programs),
        *window(left, right), capacity, block_table.stride(0) if paged else 0,
        k_cache.shape[0], k_cache.shape[1], *scales(scale, softcap),
        **shape, GROUP=group, M=tile.m, N=tile.n, MIN_KEYS=_MIN_KEYS, PAGED=paged, QUANTISED=quantised,
        FP8=_float8(k_cache.dtype, _launch.capability(q.device)), SOFTCAP=softcap > 0, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(tokens * heads,)](part, part_lse, out, lse, tokens, **shape, num_warps=4)
    return out, lse


def _float8(dtype, capability):
    """0: no fp8; 1: decoded bit by bit; 2: by the GPU's own instruction."""
    return 0 if dtype != torch.float8_e4m3fn else 2 if capability >= 89 else 1


def _splits(capacity, elements):
    """A power of 2: enough to occupy a GPU with one sequence, few enough for the partial results of many queries."""
    wanted = min(_MAX_SPLITS, triton.cdiv(capacity, _MIN_KEYS), _PARTIAL_BYTES // (4 * elements))
    return 1 << max(wanted, 1).bit_length() - 1


# ------------------------------------------------------------------------------------------------------------------------------ compiling


def compile_specs():
    """What `make cuda-check` compiles."""
    for capability in CAPABILITIES:
        for dtype, cache, dim, many in (
            ("*bf16", "*bf16", 128, False), ("*bf16", "*i8", 128, False), ("*bf16", "*u8", 128, False), ("*bf16", "*bf16", 256, False),
            ("*bf16", "*bf16", 64, False), ("*bf16", "*bf16", 128, True), ("*bf16", "*bf16", 256, True), ("*fp32", "*fp32", 128, False),
            ("*fp32", "*fp32", 128, True),
        ):  # fmt: skip
            tile = _launch.blocks(BLOCKS, capability, (2 if dtype == "*bf16" else 4, dim, many))
            quantised = cache in ("*i8", "*u8")
            float8 = _float8(torch.float8_e4m3fn if cache == "*u8" else None, capability)
            constexprs = {
                "HEADS": 40, "GROUP": 5, "DIM": dim, "BLOCK_DIM": dim, "M": tile.m, "N": tile.n, "SPLITS": 32, "MIN_KEYS": _MIN_KEYS,
                "PAGED": quantised, "QUANTISED": quantised, "FP8": float8, "SOFTCAP": False,
            }  # fmt: skip
            names = [name for name in decode_kernel.arg_names if name not in constexprs]
            types = dict.fromkeys(("cu_q_ptr", "lengths_ptr", "table_ptr"), "*i32") | dict.fromkeys(("scale2", "cap"), "fp32")
            types |= dict.fromkeys(("out_ptr", "lse_ptr"), "*fp32") | {"q_ptr": dtype, "k_ptr": cache, "v_ptr": cache}
            types |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32" if quantised else cache)
            yield CompileSpec(
                name=f"decode_attention, {dtype} on {cache}, D {dim}{', many rows' if many else ''}", kernel=decode_kernel,
                signature={name: types.get(name, "i32") for name in names}, constexprs=constexprs, num_warps=tile.warps,
                num_stages=tile.stages, matrix=many and dtype != "*fp32", capability=capability,
                aligned=tuple(n for n in names if n.startswith(("q_", "k_", "v_", "out_")) and "scale" not in n),
            )  # fmt: skip
        yield CompileSpec(
            name="decode_attention combine", kernel=combine_kernel, num_warps=4, num_stages=1, matrix=False, capability=capability,
            signature={"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32", "tokens": "i32"},
            constexprs={"HEADS": 40, "DIM": 128, "BLOCK_DIM": 128, "SPLITS": 32}, aligned=("part_ptr", "out_ptr"),
        )  # fmt: skip
