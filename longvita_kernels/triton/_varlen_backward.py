"""The backward kernels of varlen_attention: row statistics, then dk and dv by key tiles, then dq by query tiles. No atomics.

Every gradient element is written by one program that adds in a fixed order; the price is that S and dP are computed twice.
P = exp2(scale2 · q·k − lse / ln 2) as in the forward. M, N: rows of a query and of a key tile.
"""

import triton
import triton.language as tl

from longvita_kernels.triton._tiles import (
    COUNTS,
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


@triton.jit(do_not_specialize=["tokens", "rows"])
def rows_kernel(
    out_ptr, grad_ptr, lse_ptr, rest_ptr, grad_lse_ptr, stats_ptr,
    out_stride, out_head, grad_stride, grad_head, lse_head, lse_stride, rest_head, rest_stride, grad_lse_head, grad_lse_stride,
    tokens, rows, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, R: tl.constexpr,
    HAS_GRAD: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """stats (3, H, T) of every query row: lse in log 2 (+inf where blind, so that P is 0) as two floats, and delta = g·out − g_lse."""
    rows = rows.to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    token, head, column = index // HEADS, index % HEADS, tl.arange(0, BLOCK_DIM)
    inside = index < rows
    mask = inside[:, None] & (column < DIM)[None, :]
    delta = tl.zeros([R], tl.float32)
    if HAS_GRAD:
        out = tl.load(out_ptr + (token * out_stride + head * out_head)[:, None] + column[None, :], mask=mask, other=0.0)
        grad = tl.load(grad_ptr + (token * grad_stride + head * grad_head)[:, None] + column[None, :], mask=mask, other=0.0)
        delta += tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + head * grad_lse_head + token * grad_lse_stride, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + head * lse_head + token * lse_stride, mask=inside, other=float("-inf"))
    blind = lse == float("-inf")
    lse = tl.where(blind, 0.0, lse)
    high = lse * LOG2E
    rest = tl.load(rest_ptr + head * rest_head + token * rest_stride, mask=inside, other=0.0)
    low = tl.fma(lse, LOG2E, -high) + rest * LOG2E
    at = stats_ptr + head * tokens + token
    tl.store(at, tl.where(blind, float("inf"), high), mask=inside)
    tl.store(at + rows, tl.where(blind, 0.0, low), mask=inside)
    tl.store(at + 2 * rows, delta, mask=inside)


@triton.jit
def _weights(scores, lse2, rest, scale2, cap, SOFTCAP: tl.constexpr, REST: tl.constexpr):
    """P from q·k, and the derivative of the cap; lse2 and rest (REST) come in a shape that broadcasts."""
    slope = scores
    if SOFTCAP:
        scores = tanh(scores * cap)
        slope = 1 - scores * scores
    exponent = scores * scale2 - lse2
    if REST:
        exponent -= rest
    return tl.exp2(exponent), slope


@triton.jit
def _row_stats(stats_at, row, rows, length, REST: tl.constexpr):
    """(lse in log 2, its rest, delta) of query rows; beyond the document P becomes 0."""
    inside = row < length
    lse2 = tl.load(stats_at + row, mask=inside, other=float("inf"))
    delta = tl.load(stats_at + 2 * rows + row, mask=inside, other=0.0)
    rest = tl.load(stats_at + rows + row, mask=inside, other=0.0) if REST else delta
    return lse2, rest, delta


@triton.jit
def _through_queries(
    dk, dv, k, v, q_ptr, grad_ptr, stats_ptr, q_stride, q_head, grad_stride, grad_head, queries, rows,
    column, begin, a, b, end, length, offset, left, right, scale2, cap,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, M: tl.constexpr, SOFTCAP: tl.constexpr, REST: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, HAS_GRAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries of a group's heads give to dk (N, D) and dv (N, D) of a key tile; everything stands transposed, (N, M)."""
    count = block_count(begin, a, b, end, M, MASKED)
    for step in tl.range(count * GROUP):  # heads and blocks in one loop: short documents have one block, and loads run ahead across heads
        member, start = tl.cast(step // count, tl.int64), block_start(step % count, begin, a, b, M, MASKED)
        row = start + tl.arange(0, M)
        q = load_rows(q_ptr + member * q_head, start, q_stride, length, M, DIM, BLOCK_DIM, MASKED)
        stats_at = stats_ptr + member * queries
        lse2, rest, delta = _row_stats(stats_at, row, rows, length, REST)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        weights, slope = _weights(scores, lse2[None, :], rest[None, :], scale2, cap, SOFTCAP, REST)
        if MASKED:
            distance = column[:, None] - row[None, :] - offset
            weights = tl.where((distance >= -left) & (distance <= right), weights, 0.0)
        dweights = tl.zeros_like(weights) - delta[None, :]
        if HAS_GRAD:
            grad = load_rows(grad_ptr + member * grad_head, start, grad_stride, length, M, DIM, BLOCK_DIM, MASKED).to(q.dtype)
            if NEED_V:
                dv = tl.dot(weights.to(q.dtype), grad, dv, input_precision="ieee")
            if NEED_K:
                dweights = tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :]
        if NEED_K:
            dscores = weights * dweights
            if SOFTCAP:
                dscores *= slope
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, stats_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, order_ptr,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, grad_stride, grad_head, dk_stride, dk_head, dv_stride, dv_head,
    n_docs, queries, keys, rows, steps, items, turns, left, right, scale, scale2, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SOFTCAP: tl.constexpr, REST: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, HAS_GRAD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk and dv of key tiles: over the queries that see them, of all heads of the group."""
    rows = rows.to(tl.int64)
    for turn in range(turns):
        item = work_item(turn, items)
        if item < items:
            kv_head, start_k, length_k, start_q, length_q, first = tile_of(
                item, HEADS // GROUP, order_ptr, cu_k_ptr, cu_q_ptr, n_docs, keys, queries, steps, N
            )
            if first < length_k:
                # as in the forward with queries and keys exchanged: key j is seen by j − offset − right … j − offset + left
                column, offset = first + tl.arange(0, N), length_k - length_q
                begin, a, b, high = seen_by(first, length_k, -offset, right, left, length_q, N, M)
                k_at = k_ptr + start_k.to(tl.int64) * k_stride + kv_head * k_head
                v_at = v_ptr + start_k.to(tl.int64) * v_stride + kv_head * v_head
                k = load_rows(k_at, first, k_stride, length_k, N, DIM, BLOCK_DIM, True)
                v = load_rows(v_at, first, v_stride, length_k, N, DIM, BLOCK_DIM, True)
                dk, dv = tl.zeros([N, BLOCK_DIM], tl.float32), tl.zeros([N, BLOCK_DIM], tl.float32)
                head = kv_head * GROUP
                q_at = q_ptr + start_q.to(tl.int64) * q_stride + head * q_head
                grad_at = grad_ptr + start_q.to(tl.int64) * grad_stride + head * grad_head
                stats_at = stats_ptr + head * queries + start_q
                for masked in tl.static_range(2):
                    dk, dv = _through_queries(
                        dk, dv, k, v, q_at, grad_at, stats_at, q_stride, q_head, grad_stride, grad_head, queries, rows, column, begin, a, b,
                        high, length_q, offset, left, right, scale2, cap, GROUP, DIM, BLOCK_DIM, M, SOFTCAP, REST, NEED_K, NEED_V, HAS_GRAD,
                        masked == 1,
                    )  # fmt: skip
                if NEED_K:
                    at = dk_ptr + start_k.to(tl.int64) * dk_stride + kv_head * dk_head
                    store_rows(at, dk * scale, first, dk_stride, length_k, N, DIM, BLOCK_DIM, ADD)
                if NEED_V:
                    at = dv_ptr + start_k.to(tl.int64) * dv_stride + kv_head * dv_head
                    store_rows(at, dv, first, dv_stride, length_k, N, DIM, BLOCK_DIM, ADD)


@triton.jit
def _through_keys(
    dq, q, grad, lse2, rest, delta, k_ptr, v_ptr, k_stride, v_stride, row, begin, a, b, end, length, offset, left, right, scale2, cap,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr, REST: tl.constexpr, HAS_GRAD: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys begin ≤ j < end give to dq (M, D) of a query tile."""
    for number in tl.range(block_count(begin, a, b, end, N, MASKED)):
        start = block_start(number, begin, a, b, N, MASKED)
        column = start + tl.arange(0, N)
        k = load_rows(k_ptr, start, k_stride, length, N, DIM, BLOCK_DIM, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        weights, slope = _weights(scores, lse2[:, None], rest[:, None], scale2, cap, SOFTCAP, REST)
        if MASKED:
            distance = column[None, :] - row[:, None] - offset
            weights = tl.where((distance >= -left) & (distance <= right) & (column < length)[None, :], weights, 0.0)
        dweights = tl.zeros_like(weights) - delta[:, None]
        if HAS_GRAD:
            v = load_rows(v_ptr, start, v_stride, length, N, DIM, BLOCK_DIM, MASKED)
            dweights = tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None]
        dscores = weights * dweights
        if SOFTCAP:
            dscores *= slope
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=COUNTS)
def queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, stats_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, order_ptr,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, grad_stride, grad_head, dq_stride, dq_head,
    n_docs, queries, keys, rows, steps, items, turns, left, right, scale, scale2, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SOFTCAP: tl.constexpr, REST: tl.constexpr, HAS_GRAD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dq of query tiles: over the keys that they see."""
    rows = rows.to(tl.int64)
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
                grad = q
                if HAS_GRAD:
                    grad_at = grad_ptr + start_q.to(tl.int64) * grad_stride + head * grad_head
                    grad = load_rows(grad_at, first, grad_stride, length_q, M, DIM, BLOCK_DIM, True).to(q.dtype)
                lse2, rest, delta = _row_stats(stats_ptr + head * queries + start_q, row, rows, length_q, REST)
                k_at = k_ptr + start_k.to(tl.int64) * k_stride + head // GROUP * k_head
                v_at = v_ptr + start_k.to(tl.int64) * v_stride + head // GROUP * v_head
                dq = tl.zeros([M, BLOCK_DIM], tl.float32)
                for masked in tl.static_range(2):
                    dq = _through_keys(
                        dq, q, grad, lse2, rest, delta, k_at, v_at, k_stride, v_stride, row, begin, a, b, high, length_k, offset, left,
                        right, scale2, cap, DIM, BLOCK_DIM, N, SOFTCAP, REST, HAS_GRAD, masked == 1,
                    )  # fmt: skip
                at = dq_ptr + start_q.to(tl.int64) * dq_stride + head * dq_head
                store_rows(at, dq * scale, first, dq_stride, length_q, M, DIM, BLOCK_DIM, ADD)
