"""decode_attention inside torch: what a GPU runs where no kernel of ours is verified yet.

All sequences at once, some keys at a time. The queries are cut into tiles of as many rows as a sequence brings on average, each of one
sequence: shapes alone say how many tiles suffice, so nothing is read back and a call can be captured in a CUDA graph. The price: a tile
goes through all places of its sequence's cache (or of its window), also those behind the last token; a CPU stops at the longest sequence.

Memory beside the results: _STEP numbers of 4 bytes at most for the keys of a step, 256 MiB (more only where _FEWEST keys need more), and
queries and float32 sums of at most 2T rows. Numbers out of range, which nobody may look at on a GPU, are clamped.

N: tiles, M: queries of a tile, L: keys of a step, J: key/value heads, G: query heads of each; R = G · M rows of scores.
"""

import torch

from longvita_kernels.ops import _cache, _common
from longvita_kernels.ops._products import product

_STEP, _FEWEST = 1 << 26, 64


def forward(q_THD, k_cache, v_cache, cu_q, cache_seqlens, block_table, k_scale, v_scale, left, right, softcap, scale):
    """out (T, H, D) and lse (H, T). left, right: −1 is unlimited."""
    (tokens, heads, dim), kv_heads, wide = q_THD.shape, k_cache.shape[2], _common.compute_dtype(q_THD)
    if tokens * len(cache_seqlens) == 0:
        return torch.zeros_like(q_THD), q_THD.new_full((heads, tokens), -torch.inf, dtype=wide)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    sequence_T, position_T, place_T, rows, tiles = _cut(tokens, cu_q, cache_seqlens.clamp(0, capacity))
    token_NM = torch.zeros(tiles * rows, dtype=torch.int64, device=q_THD.device)
    token_NM = token_NM.scatter_(0, place_T, torch.arange(tokens, device=q_THD.device)).view(tiles, rows)
    sequence_N, position_NM = sequence_T[token_NM[:, 0]], position_T[token_NM]
    length_N1 = cache_seqlens.clamp(0, capacity)[sequence_N].unsqueeze(1)
    q = q_THD[token_NM].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(tiles * kv_heads, -1, dim)
    first_N1 = position_NM[:, :1].sub(left).clamp_(min=0) if left >= 0 else torch.zeros_like(length_N1)
    peak = torch.full((*q.shape[:2], 1), -torch.inf, dtype=wide, device=q.device)
    total, sums = torch.zeros_like(peak), torch.zeros(q.shape, dtype=wide, device=q.device)
    count = _keys(k_cache, capacity, cache_seqlens, rows, left, right)
    step = max(_FEWEST, _STEP // (tiles * (4 * kv_heads * dim + 3 * (heads + 1) * rows)))
    for start in range(0, count, step):
        key_NL = first_N1 + torch.arange(start, min(start + step, count), device=q.device)
        seen_NML = _seen(key_NL, position_NM, length_N1, left, right)
        at_NL = key_NL.minimum(length_N1 - 1).clamp_(min=0)  # behind the end may stand anything, NaN as well: never read
        k, v = (
            _cache.take(cache, factor, block_table, sequence_N, at_NL, q.dtype).flatten(0, 1)
            for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )
        scores = product(q, k.transpose(1, 2)).mul_(scale)
        if softcap > 0:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores.view(tiles, heads, rows, -1).masked_fill_(~seen_NML.unsqueeze(1), -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        base = new_peak.masked_fill(new_peak == -torch.inf, 0.0)  # nothing seen yet
        weights, shrink = scores.sub_(base).exp_(), (peak - base).exp_()
        total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        sums = sums.mul_(shrink).add_(product(weights.to(q.dtype), v))
        peak = new_peak
    blind = total == 0.0
    out = (sums / total.masked_fill(blind, 1.0)).masked_fill_(blind, 0.0)  # 0 · NaN, where an empty sequence's first key was read
    out, lse = (x.view(tiles, heads, rows, -1).transpose(1, 2).flatten(0, 1)[place_T] for x in (out, peak + total.log()))
    return out.to(q.dtype), lse.squeeze(2).T


def _cut(tokens, cu_q, lengths_B):
    """Of each query its sequence, its position there, and its place among the rows of all tiles; rows of a tile, number of tiles.

    Σ ⌈n / M⌉ ≤ (Σ n + B · (M − 1)) / M tiles hold all queries."""
    batch = cu_q.shape[0] - 1
    rows = -(-tokens // batch)
    tiles = (tokens + batch * (rows - 1)) // rows
    token_T = torch.arange(tokens, dtype=torch.int32, device=cu_q.device)
    sequence_T = torch.searchsorted(cu_q[1:].contiguous(), token_T, right=True).clamp_(max=batch - 1)
    counts_B = cu_q.diff().clamp_(min=0)
    number_T = token_T - cu_q[sequence_T]
    position_T = (lengths_B.long() - counts_B)[sequence_T] + number_T
    tiles_B = (counts_B + (rows - 1)) // rows
    place_T = ((tiles_B.cumsum(0) - tiles_B)[sequence_T] + number_T // rows) * rows + number_T % rows
    return sequence_T, position_T, place_T.clamp_(0, tiles * rows - 1), rows, tiles


def _keys(k_cache, capacity, cache_seqlens, rows, left, right):
    """How many keys, from the first that its window reaches, a tile may see."""
    if k_cache.numel() == 0:
        return 0
    if _common.checks_values(cache_seqlens):
        capacity = int(cache_seqlens.max())
    return min(capacity, left + rows + right) if left >= 0 and right >= 0 else capacity


def _seen(key_NL, position_NM, length_N1, left, right):
    """Which keys each query sees, (N, M, L)."""
    seen_NML = (key_NL < length_N1).unsqueeze(1).expand(-1, position_NM.shape[1], -1)
    if left >= 0 or right >= 0:
        distance_NML = key_NL.unsqueeze(1) - position_NM.unsqueeze(2)
        seen_NML = seen_NML & (distance_NML >= -left) if left >= 0 else seen_NML
        seen_NML = seen_NML & (distance_NML <= right) if right >= 0 else seen_NML
    return seen_NML
