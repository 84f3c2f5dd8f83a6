"""Keys and values of the tokens already read, for generation.

A cache holds one sequence per row. `begin(new_lengths)` plans one forward pass that appends so many tokens to each sequence (0 is fine, so
that finished sequences cost nothing), the layers attend through the plan, and `commit` makes the new lengths count. A pass that fails in
between changes nothing.

Shapes: B sequences, S capacity, K key/value heads, H query heads, D head size, T new tokens of all sequences.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from longvita.config import TextConfig
from longvita_kernels import append_kv, decode_attention, memory, varlen_attention

# Up to this many new tokens per sequence decode_attention reads the cache once for all of them; above it, varlen_attention over the cached
# prefix blocks over queries too and wins.
DECODE_QUERIES = 8


class KVCache:
    """Preallocated keys and values, (B, S, K, D) per layer; S grows in blocks when a sequence outgrows it."""

    def __init__(
        self, config: TextConfig, batch_size: int, *, capacity: int = 0, block: int = 256, device=None, dtype: torch.dtype | None = None
    ):
        if batch_size < 1 or capacity < 0 or block < 1:
            raise ValueError(f"batch_size and block must be at least 1 and capacity at least 0, got {batch_size}, {block} and {capacity}")
        self.block, self.capacity = block, 0
        self.lengths = [0] * batch_size
        shape = (batch_size, 0, config.num_kv_heads, config.head_dim)
        self.keys = [memory.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [memory.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.reserve(capacity)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(store.numel() * store.element_size() for store in (*self.keys, *self.values))

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` per sequence. Say the final length when it is known: growing copies what is there."""
        if tokens <= self.capacity:
            return
        if self.capacity:
            tokens = max(tokens, self.capacity + self.capacity // 4)  # so that n appends copy O(n) tokens, not O(n²)
        self.capacity = -(-tokens // self.block) * self.block
        used = max(self.lengths)
        for stores in (self.keys, self.values):
            for i, old in enumerate(stores):  # one layer at a time: the peak is one layer above the result
                stores[i] = old.new_empty(old.shape[0], self.capacity, *old.shape[2:])
                stores[i][:, :used] = old[:, :used]

    def begin(self, new_lengths: Sequence[int]) -> "CachedAttention":
        """Plans a pass that appends `new_lengths[i]` tokens to sequence i."""
        if len(new_lengths) != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} sequences, the batch has {len(new_lengths)} documents: "
                "give every sequence its own document, empty where nothing is new"
            )
        self.reserve(max(old + new for old, new in zip(self.lengths, new_lengths, strict=True)))
        return CachedAttention(self, list(new_lengths))


class CachedAttention:
    """The attention of one pass over a cache: appends the new keys and values, then lets every query see its own sequence up to itself."""

    def __init__(self, cache: KVCache, new_lengths: list[int]):
        device = cache.keys[0].device
        self.cache, self.max_new = cache, max(new_lengths)
        self.before = list(cache.lengths)
        self.after = [old + new for old, new in zip(cache.lengths, new_lengths, strict=True)]
        self.starts = [0, *accumulate(new_lengths)]
        self.cu_seqlens = torch.tensor(self.starts, dtype=torch.int32, device=device)
        self.before_B = torch.tensor(self.before, dtype=torch.int32, device=device)
        self.after_B = torch.tensor(self.after, dtype=torch.int32, device=device)
        continued = [i for i, new in enumerate(new_lengths) if new and self.before[i]]
        self.fresh_only = not continued
        self.few_queries = bool(continued) and self.max_new <= DECODE_QUERIES
        self.segments = [] if self.fresh_only or self.few_queries else self._segments(new_lengths, device)

    def _segments(self, new_lengths, device):
        """[(first row, end row, sequence or None, cu_seqlens, longest)]: each continued one alone, neighbouring fresh ones together."""
        segments, fresh = [], []

        def flush(end):
            if fresh:
                start = end - sum(fresh)
                cu_seqlens = torch.tensor([0, *accumulate(fresh)], dtype=torch.int32, device=device)
                segments.append((start, end, None, cu_seqlens, max(fresh)))
                fresh.clear()

        for i, new in enumerate(new_lengths):
            start = self.starts[i]
            if new and self.before[i]:
                flush(start)
                segments.append((start, start + new, i, torch.tensor([0, new], dtype=torch.int32, device=device), new))
            elif new:
                fresh.append(new)
        flush(self.starts[-1])
        return segments

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        append_kv(k_TKD, v_TKD, keys, values, self.cu_seqlens, self.before_B)
        if self.fresh_only:
            return varlen_attention(q_THD, k_TKD, v_TKD, self.cu_seqlens, max_seqlen_q=self.max_new, max_seqlen_k=self.max_new)
        if self.few_queries:
            return decode_attention(q_THD, keys, values, self.cu_seqlens, self.after_B)
        parts = []
        for start, end, sequence, cu_seqlens, longest in self.segments:
            if sequence is None:
                k_SKD, v_SKD, cu_k, longest_k = k_TKD[start:end], v_TKD[start:end], cu_seqlens, longest
            else:  # the whole prefix, read where it lies: queries are aligned to its end
                longest_k = self.after[sequence]
                k_SKD, v_SKD = keys[sequence, :longest_k], values[sequence, :longest_k]
                cu_k = cu_seqlens.new_tensor([0, longest_k])
            out = varlen_attention(q_THD[start:end], k_SKD, v_SKD, cu_seqlens, cu_k, max_seqlen_q=longest, max_seqlen_k=longest_k)
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def commit(self) -> None:
        """The tokens of this pass are read."""
        self.cache.lengths = self.after
