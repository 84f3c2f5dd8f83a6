"""The forward kernel of varlen_attention: a tile of queries of one document and head over the keys that it sees.

Scores are kept in units of log 2: P = exp2(scale2 · q·k − lse / ln 2). M, N: rows of a query and of a key tile.
"""

import triton
import triton.language as tl

from longvita_kernels.triton._tiles import (
    COUNTS,
    LN2,
    LOG2E,
    block_count,
    block_start,
    load_rows,
    seen_by,
    store_rows,
    tanh,
    tile_of,
    work_item,
)


@triton.jit
def _attend(
    q, peak, total, acc, k_ptr, v_ptr, k_stride, v_stride, row, begin, a, b, end, length, offset, left, right, scale2, cap,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax of a query tile over the keys begin ≤ j < end. total is relative to 2 ** peak; scale2 > 0."""
    for number in tl.range(block_count(begin, a, b, end, N, MASKED)):
        start = block_start(number, begin, a, b, N, MASKED)
        column = start + tl.arange(0, N)
        k = load_rows(k_ptr, start, k_stride, length, N, DIM, BLOCK_DIM, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            scores = tanh(scores * cap)
        if MASKED:
            distance = column[None, :] - row[:, None] - offset
            scores = tl.where((distance >= -left) & (distance <= right) & (column < length)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale2)
        base = new_peak
        if MASKED:
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing seen yet
        weights = tl.exp2(scores * scale2 - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(v_ptr, start, v_stride, length, N, DIM, BLOCK_DIM, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return peak, total, acc


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rest_ptr, cu_q_ptr, cu_k_ptr, order_ptr,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head,
    n_docs, queries, keys, steps, items, turns, left, right, scale2, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """out, lse and its rest of query tiles."""
    for turn in range(turns):
        item = work_item(turn, items)
        if item < items:
            head, start_q, length_q, start_k, length_k, first = tile_of(
                item, HEADS, order_ptr, cu_q_ptr, cu_k_ptr, n_docs, queries, keys, steps, M
            )
            if first < length_q:
                row, offset = first + tl.arange(0, M), length_k - length_q
                begin, a, b, high = seen_by(first, length_q, offset, left, right, length_k, M, N)
                q_at = q_ptr + start_q.to(tl.int64) * q_stride + head * q_head
                q = load_rows(q_at, first, q_stride, length_q, M, DIM, BLOCK_DIM, True)
                k_at = k_ptr + start_k.to(tl.int64) * k_stride + head // GROUP * k_head
                v_at = v_ptr + start_k.to(tl.int64) * v_stride + head // GROUP * v_head
                peak, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
                acc = tl.zeros([M, BLOCK_DIM], tl.float32)
                for masked in tl.static_range(2):
                    peak, total, acc = _attend(
                        q, peak, total, acc, k_at, v_at, k_stride, v_stride, row, begin, a, b, high, length_k, offset, left, right, scale2,
                        cap, DIM, BLOCK_DIM, N, SOFTCAP, masked == 1,
                    )  # fmt: skip
                blind = total == 0
                safe = tl.where(blind, 1.0, total)
                lse = tl.where(blind, 0.0, (peak + tl.log2(safe)) * LN2)
                rest = tl.log2(safe) - tl.fma(lse, LOG2E, -tl.where(blind, 0.0, peak))
                at = head * queries + start_q + row
                tl.store(lse_ptr + at, tl.where(blind, float("-inf"), lse), mask=row < length_q)
                tl.store(rest_ptr + at, rest * LN2, mask=row < length_q)
                out_at = out_ptr + start_q.to(tl.int64) * out_stride + head * out_head
                store_rows(out_at, acc / safe[:, None], first, out_stride, length_q, M, DIM, BLOCK_DIM, False)
