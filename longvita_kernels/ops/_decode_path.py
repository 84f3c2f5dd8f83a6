"""decode_attention inside torch: what a GPU runs where no kernel of ours is verified yet.

All sequences at once, some keys at a time. The queries are cut into tiles of as many rows as a sequence brings on average, each of one
sequence: shapes alone say how many tiles suffice, so nothing is read back and a call can be captured in a CUDA graph. The price: a tile
goes through all places of its sequence's cache (or of its window), also those behind the last token; a CPU stops at the longest sequence.

Memory beside the results: _STEP numbers of 4 bytes at most for the keys of a step, on a GPU 256 MiB (more only where _FEWEST keys need
more), and queries and float32 sums of at most 2T rows. Numbers out of range, which nobody may look at on a GPU, are clamped.

N: tiles, M: queries of a tile, L: keys of a step, J: key/value heads, G: query heads of each; R = G · M rows of scores.
"""

import torch

from longvita_kernels.ops import _cache, _common
from longvita_kernels.ops._products import product

_STEP, _FEWEST = (1 << 21, 1 << 26), 64  # on a CPU what its caches hold, on a GPU what fills it


def forward(q_THD, k_cache, v_cache, cu_q, cache_seqlens, block_table, k_scale, v_scale, left, right, softcap, scale):
    """out (T, H, D) and lse (H, T). left, right: −1 is unlimited."""
    (tokens, heads, dim), kv_heads, wide = q_THD.shape, k_cache.shape[2], _common.compute_dtype(q_THD)
    if tokens * len(cache_seqlens) == 0:
        return torch.zeros_like(q_THD), q_THD.new_full((heads, tokens), -torch.inf, dtype=wide)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    tiles = _Tiles(tokens, cu_q)
    length_T = cache_seqlens.clamp(0, capacity).long()[tiles.sequence_T]
    position_NM = tiles.of(length_T - tiles.left_T)
    sequence_N, length_N1 = tiles.of(tiles.sequence_T)[:, 0], tiles.of(length_T)[:, :1]
    (count_N, rows), heads_JG = position_NM.shape, (kv_heads, heads // kv_heads)
    q = tiles.of(q_THD).unflatten(2, heads_JG).permute(0, 2, 3, 1, 4).reshape(count_N * kv_heads, -1, dim)
    first_N1 = position_NM[:, :1].sub(left).clamp_(min=0) if left >= 0 else torch.zeros_like(length_N1)
    peak = torch.full((*q.shape[:2], 1), -torch.inf, dtype=wide, device=q.device)
    total, sums = torch.zeros_like(peak), torch.zeros(q.shape, dtype=wide, device=q.device)
    keys = _keys(k_cache, capacity, cache_seqlens, rows, left, right)
    step = max(_FEWEST, _STEP[q.is_cuda] // (count_N * (4 * kv_heads * dim + 3 * (heads + 1) * rows)))
    for start in range(0, keys, step):
        key_NL = first_N1 + torch.arange(start, min(start + step, keys), device=q.device)
        seen_NML = _seen(key_NL, position_NM, length_N1, left, right)
        at_NL = key_NL.minimum(length_N1 - 1).clamp_(min=0)  # behind the end may stand anything, NaN as well: never read
        k, v = (
            _cache.take(cache, factor, block_table, sequence_N, at_NL, q.dtype).flatten(0, 1)
            for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )
        scores = product(q, k.transpose(1, 2)).mul_(scale)
        if softcap > 0:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores.view(count_N, heads, rows, -1).masked_fill_(~seen_NML.unsqueeze(1), -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        base = new_peak.masked_fill(new_peak == -torch.inf, 0.0)  # nothing seen yet
        weights, shrink = scores.sub_(base).exp_(), (peak - base).exp_()
        total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        sums = sums.mul_(shrink).add_(product(weights.to(q.dtype), v))
        peak = new_peak
    blind = total == 0.0
    out = (sums / total.masked_fill(blind, 1.0)).masked_fill_(blind, 0.0)  # 0 · NaN, where an empty sequence's first key was read
    out, lse = (tiles.tokens(x.view(count_N, heads, rows, -1).transpose(1, 2)) for x in (out, peak + total.log()))
    return out.to(q.dtype), lse.squeeze(2).T


class _Tiles:
    """Where each query stands: sequence_T, its sequence; left_T, how many queries of it are left, this one included; and its tile.

    Σ ⌈n / M⌉ ≤ (Σ n + B · (M − 1)) / M tiles of M rows hold all queries."""

    def __init__(self, tokens, cu_q):
        batch = cu_q.shape[0] - 1
        rows = -(-tokens // batch)
        self.shape = (tokens + batch * (rows - 1)) // rows, rows
        token_T = torch.arange(tokens, dtype=torch.int32, device=cu_q.device)
        self.sequence_T = torch.searchsorted(cu_q[1:].contiguous(), token_T, right=True).clamp_(max=batch - 1)
        self.left_T = cu_q[1:][self.sequence_T] - token_T
        self.token_NM = None  # tiles hold the queries as they come
        if batch > 1 and rows > 1:
            counts_B = cu_q.diff().clamp_(min=0)
            tiles_B, number_T = (counts_B + (rows - 1)) // rows, token_T - cu_q[self.sequence_T]
            place_T = ((tiles_B.cumsum(0) - tiles_B)[self.sequence_T] + number_T // rows) * rows + number_T % rows
            self.place_T = place_T.clamp_(0, self.shape[0] * rows - 1)
            token_NM = torch.zeros(self.shape, dtype=torch.int64, device=cu_q.device)
            self.token_NM = token_NM.view(-1).scatter_(0, self.place_T, token_T.long()).view(self.shape)

    def of(self, x_T):
        """(T, …) → (N, M, …); places that are left over repeat the first query."""
        return x_T.unflatten(0, self.shape) if self.token_NM is None else x_T[self.token_NM]

    def tokens(self, x_NM):
        """(N, M, …) → (T, …)."""
        return x_NM.flatten(0, 1) if self.token_NM is None else x_NM.flatten(0, 1)[self.place_T]


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
