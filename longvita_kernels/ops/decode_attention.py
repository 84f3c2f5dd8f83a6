"""Attention of one or a few new queries per sequence over that sequence's whole cache; the work is split over the cache.

Query i of the n that sequence b brings stands at position p = cache_seqlens[b] − n + i of its cache; it sees the keys j with

    0 ≤ j < cache_seqlens[b],   j ≤ p if causal,   p − left ≤ j ≤ p + right   (window_size = (left, right), −1 = unlimited)

    s_j = cap(softmax_scale · q · k_j),  cap(x) = softcap · tanh(x / softcap) if softcap > 0, else x
    lse = log Σ_j exp(s_j),  out = Σ_j exp(s_j − lse) v_j;  a query that sees nothing gives out = 0, lse = −inf

Query head h reads key/value head h // (Hq / Hkv). An 8-bit cache means k_j = code · k_scale, v_j = code · v_scale. Layouts: `_cache.py`.
The split is a function of the sequence alone, so results depend neither on the number of threads nor on the rest of the batch.

(T, Hq, D): q, out. T queries of all sequences, Hq query heads, Hkv key/value heads, G = Hq / Hkv, n queries and L keys of one sequence.
Source: FlashAttention-2 (online softmax), Flash-Decoding (split over the keys).
"""

import torch

from longvita_kernels import backends, native
from longvita_kernels.ops import _cache, _common, _decode_path
from longvita_kernels.spec import OpSpec, SampleInput


def reference(
    q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, *, block_table=None, causal=True, window_size=(-1, -1), softcap=0.0,
    k_scale=None, v_scale=None, softmax_scale=None, return_lse=False,
):  # fmt: skip
    """The definition in plain torch, float32 inside (float64 for float64)."""
    options = (block_table, causal, window_size, softcap, k_scale, v_scale, softmax_scale)
    out, lse = _compose(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, *options, _common.compute_dtype(q))
    return (out, lse) if return_lse else out


def base(
    q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, *, block_table=None, causal=True, window_size=(-1, -1), softcap=0.0,
    k_scale=None, v_scale=None, softmax_scale=None, return_lse=False,
):  # fmt: skip
    """The plain composition in q's own dtype."""
    options = (block_table, causal, window_size, softcap, k_scale, v_scale, softmax_scale)
    out, lse = _compose(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, *options, q.dtype)
    return (out, lse) if return_lse else out


def _compose(q_THD, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, causal, window, softcap, k_scale, v_scale, scale, dtype):
    offsets, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    group = q_THD.shape[1] // k_cache.shape[2]
    lse_dtype = torch.promote_types(dtype, torch.float32)
    outs, lses = [q_THD[:0].to(dtype)], [q_THD.new_zeros(q_THD.shape[1], 0, dtype=lse_dtype)]
    for b, length in enumerate(lengths):
        q_nhgd = (q_THD[offsets[b] : offsets[b + 1]].to(dtype) * scale).unflatten(1, (-1, group))
        k_LhD = _cache.gather(k_cache, k_scale, block_table, b, length, dtype)
        v_LhD = _cache.gather(v_cache, v_scale, block_table, b, length, dtype)
        scores_hgnL = torch.einsum("nhgd,lhd->hgnl", q_nhgd, k_LhD)
        if softcap > 0:
            scores_hgnL = softcap * torch.tanh(scores_hgnL / softcap)
        seen_nL = _visible(q_nhgd.shape[0], length, causal, window, q_THD.device)
        lse_hgn = scores_hgnL.to(lse_dtype).masked_fill(~seen_nL, float("-inf")).logsumexp(-1)
        peak_hgn1 = lse_hgn.masked_fill(lse_hgn == float("-inf"), 0.0).unsqueeze(-1)
        weights_hgnL = (scores_hgnL.to(lse_dtype) - peak_hgn1).exp().masked_fill(~seen_nL, 0.0).to(dtype)
        outs.append(torch.einsum("hgnl,lhd->nhgd", weights_hgnL, v_LhD).flatten(1, 2))
        lses.append(lse_hgn.flatten(0, 1))
    return torch.cat(outs).to(q_THD.dtype), torch.cat(lses, dim=1)


def _visible(n, length, causal, window, device):
    position_n1 = torch.arange(length - n, length, device=device).unsqueeze(1)
    key_L = torch.arange(length, device=device)
    seen_nL = torch.ones(n, length, dtype=torch.bool, device=device)
    if causal:
        seen_nL &= key_L <= position_n1
    if window[0] >= 0:
        seen_nL &= key_L >= position_n1 - window[0]
    if window[1] >= 0:
        seen_nL &= key_L <= position_n1 + window[1]
    return seen_nL


def decode_attention(
    q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, *, block_table=None, causal=True, window_size=(-1, -1), softcap=0.0,
    k_scale=None, v_scale=None, softmax_scale=None, return_lse=False,
):  # fmt: skip
    """Attention of the newest queries of each sequence over its cache, for decoding and for prefill in chunks. Forward only.

    q                 (T, Hq, D) float32, bfloat16 or float16; last dimension dense; cast under autocast
    k_cache, v_cache  (B, S, Hkv, D), or (n_blocks, block, Hkv, D) with `block_table`; a floating dtype, or int8 / float8_e4m3fn with
                      scales. A long one is read faster from `longvita_kernels.memory.empty` (huge pages)
    cu_seqlens_q      (B + 1,) int32: queries of sequence b are q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]], the last of its cache in order
    cache_seqlens     (B,) int32: TOTAL tokens in the cache of each sequence, those of the queries included (call `append_kv` first)
    block_table       (B, n) int32 block numbers; unused entries may hold anything
    k_scale, v_scale  float32, the cache's shape without D; required with an 8-bit cache, forbidden with another
    softmax_scale     default 1 / sqrt(D); window_size counts keys left and right of the query's own position, −1 = unlimited
    → out (T, Hq, D) in q's dtype; with return_lse also lse (Hq, T) float32, natural logarithm
    Memory on a CPU beside them: some 0.4 MiB a thread (40 query heads, 8 KV heads of 128), and for a sequence whose cache is cut float32
    sums of the parts: 1.4 MiB for one query and these heads, at most 1.1 MiB a KV head for many.
    Raises ValueError for arguments that do not fit each other or the cache, RuntimeError when a gradient is asked of it.
    """
    (q,) = _common.autocast_tensors(q)
    cu_seqlens_q, cache_seqlens = _common.as_offsets("cu_seqlens_q", cu_seqlens_q), _common.as_offsets("cache_seqlens", cache_seqlens)
    if q.dim() != 3 or not _common.common_case(q):
        _common.check_shape("q", q, (None, None, None), "(T, Hq, D)")
        _common.check_float("q", q)
        _common.check_last_stride("q", q)
    _, heads, dim = q.shape
    _common.check_head_dim("q", dim)
    _cache.check_cache(("q", q), k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale)
    kv_heads = k_cache.shape[2]
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, k_cache {kv_heads}; expected a multiple (grouped-query attention)")
    left, right, softcap, scale = _common.attention_options(window_size, softcap, softmax_scale, dim)
    tensors = (q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale)
    if not return_lse and _common.is_direct(_decode, tensors):
        return _decode_impl(*tensors, causal, left, right, softcap, scale, only_out=True)
    out, lse = _common.call(_decode, _decode_impl, tensors, causal, left, right, softcap, scale)
    return (out, lse) if return_lse else out


# ------------------------------------------------------------------------------------------------------------------------------- flat op


native_cannot = _cache.native_cannot


def _triton():
    from longvita_kernels.triton import decode_attention

    return decode_attention


def _decode_impl(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale, causal, left, right, softcap, scale, *,
                 only_out=False):  # fmt: skip
    """out and lse; `only_out`: just out (not for the dispatcher), with lse in the scratch."""
    backend = backends.choose("decode_attention", q, native_cannot(k_cache=k_cache))
    nothing = q.shape[0] == 0 or _cache.holds_nothing(k_cache, block_table)
    if backend != "native" or nothing:  # the native kernel does so itself
        _cache.check_lengths(cu_seqlens_q, cache_seqlens, k_cache, block_table, q.shape[0], appended=False)
    if nothing and backend != "reference":
        out, lse = _decode_fake(
            q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale, causal, left, right, softcap, scale
        )
        return out.zero_() if only_out else (out.zero_(), lse.fill_(-torch.inf))
    if backend == "triton":
        cu_seqlens_q, cache_seqlens = cu_seqlens_q.contiguous(), cache_seqlens.contiguous()
        found = _triton().decode(
            q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale, left, 0 if causal else right, softcap, scale,
        )  # fmt: skip
        return found[0] if only_out else found
    if backend == "torch":
        found = _common.run_reference(
            _decode_path.forward, q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale, left,
            0 if causal else right, softcap, scale,
        )  # fmt: skip
        return found[0] if only_out else found
    if backend == "reference":
        found = _common.run_reference(
            reference, q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table=block_table, causal=causal, window_size=(left, right),
            softcap=softcap, k_scale=k_scale, v_scale=v_scale, softmax_scale=scale, return_lse=True,
        )  # fmt: skip
        return found[0] if only_out else found
    tokens, heads, _ = q.shape
    out, lse = _common.dense_like(q), None if only_out else torch.empty(heads, tokens, dtype=torch.float32)
    cu_seqlens_q, cache_seqlens = cu_seqlens_q.contiguous(), cache_seqlens.contiguous()
    problem = native.load().decode_attention_problem(
        native.dtype_code(q.dtype), q.data_ptr(), tokens, heads, *q.stride(),
        *_cache.native_arguments(k_cache, v_cache, block_table, k_scale, v_scale),
        cache_seqlens.shape[0], cu_seqlens_q.data_ptr(), cache_seqlens.data_ptr(), causal, left, right, softcap, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    size = problem.scratch()
    scratch = torch.empty(size + (heads * tokens if only_out else 0), dtype=torch.float32)
    at = scratch.data_ptr()
    problem.run(out.data_ptr(), at + 4 * size if only_out else lse.data_ptr(), at, size)
    return out if only_out else (out, lse)


def _decode_fake(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale, causal, left, right, softcap, scale):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


_decode = _common.define_op(
    "decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor cache_seqlens, Tensor? block_table, Tensor? k_scale, "
    "Tensor? v_scale, bool causal, SymInt left, SymInt right, float softcap, float scale) -> (Tensor, Tensor)",
    _decode_impl, _decode_fake,
    no_gradient_message="decode_attention is forward only: it has no gradient. Remedy: call it under torch.no_grad() or "
    "torch.inference_mode(), and varlen_attention for training",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------------------- spec


def _samples(dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def make(label, new, lengths, rows, *, heads=(4, 2), dim=64, cache_dtype=None, table=None, **options):
        cache_dtype = cache_dtype or dtype
        query_heads, kv_heads = heads
        shape = (*rows, kv_heads, dim)
        q = random(sum(new), query_heads, 2 * dim).to(dtype)[..., :dim]
        if cache_dtype in _cache.LARGEST_CODE:
            (k, k_scale), (v, v_scale) = (_cache.quantise(random(*shape), cache_dtype) for _ in "kv")
            options |= {"k_scale": k_scale, "v_scale": v_scale}
        else:
            k, v = random(*rows, kv_heads, 2, dim).to(cache_dtype).unbind(-2)
        cu_seqlens_q = torch.tensor([0, *new], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        args = (q, k, v, cu_seqlens_q, torch.tensor(lengths, dtype=torch.int32, device=device))
        return SampleInput(label, args, {"block_table": table, "return_lse": True, **options})

    table = torch.tensor([[4, 0, -1], [2, 5, 1]], dtype=torch.int32, device=device)
    yield make("decode, ragged lengths, no query, empty cache", (1, 1, 0, 1), (37, 1, 5, 0), (4, 41))
    yield make("split over the cache, group 5", (1,), (1601,), (1, 1700), heads=(5, 1))
    yield make("chunk of 23, group 1, D 40", (23, 2), (71, 2), (2, 80), heads=(3, 3), dim=40)
    yield make("more queries than keys", (7,), (3,), (1, 9), heads=(4, 4), dim=32)
    yield make("window, softcap", (9, 1), (50, 50), (2, 64), window_size=(11, 0), softcap=3.0)
    yield make("not causal, two-sided window, scale", (6,), (29,), (1, 29), causal=False, window_size=(4, 2), softmax_scale=0.3)
    yield make("paged", (5, 1), (7, 23), (6, 8), table=table)
    yield make("int8", (3, 1), (61, 130), (2, 130), heads=(8, 2), dim=40, cache_dtype=torch.int8)
    yield make("int8, split, group 5, D 128", (1,), (1601,), (1, 1700), heads=(5, 1), dim=128, cache_dtype=torch.int8)
    yield make("int8, window, D 32", (9, 1), (70, 50), (2, 80), dim=32, cache_dtype=torch.int8, window_size=(40, 0))
    yield make("int8 paged", (2, 1), (13, 20), (6, 8), cache_dtype=torch.int8, table=table)
    yield make("D 128, group 5, tiles and parts of tiles", (1, 1, 0, 1), (33, 64, 5, 7), (4, 70), heads=(10, 2), dim=128)
    yield make("D 128, four queries, window, softcap", (4, 2), (75, 3), (2, 80), heads=(3, 3), dim=128, window_size=(40, 0), softcap=3.0)
    yield make("D 128, split, three heads", (1,), (1100,), (1, 1101), heads=(6, 3), dim=128)
    yield make("int8 paged, D 128, group 4", (1, 1), (13, 20), (6, 8), heads=(8, 2), dim=128, cache_dtype=torch.int8, table=table)
    window = {"causal": False, "window_size": (30, 9)}
    yield make("int8, D 128, two-sided window", (3,), (90,), (1, 90), heads=(3, 3), dim=128, cache_dtype=torch.int8, **window)
    yield make("fp8", (1, 4), (70, 9), (2, 70), cache_dtype=torch.float8_e4m3fn)
    yield make("float16 cache, D 256", (1,), (33,), (1, 40), heads=(2, 1), dim=256, cache_dtype=torch.float16)


def _pairs(sample):
    """(query, key) pairs of one head that the mask lets through."""
    _, _, _, cu_seqlens_q, cache_seqlens = sample.args
    options = sample.kwargs
    counts = cu_seqlens_q.diff().tolist()
    return sum(
        int(_visible(n, length, options.get("causal", True), options.get("window_size", (-1, -1)), "cpu").sum())
        for n, length in zip(counts, cache_seqlens.tolist(), strict=True)
    )


def _bytes(sample):
    q, k_cache, _, _, cache_seqlens = sample.args
    tokens, kv_heads, dim = int(cache_seqlens.sum()), k_cache.shape[2], k_cache.shape[3]
    scales = 8 * tokens * kv_heads if sample.kwargs.get("k_scale") is not None else 0
    return 2 * q.numel() * q.element_size() + 2 * tokens * kv_heads * dim * k_cache.element_size() + scales + 4 * q.shape[0] * q.shape[1]


def _flops(sample):
    q = sample.args[0]
    return 4 * _pairs(sample) * q.shape[1] * q.shape[2]


def _flat_calls(sample):
    q, k_cache, *rest = sample.args
    if k_cache.dtype == torch.float8_e4m3fn:
        return  # opcheck cannot compare fp8 tensors; int8 takes the same way through the op
    options = sample.kwargs
    left, right = options.get("window_size", (-1, -1))
    scale = options.get("softmax_scale") or q.shape[2] ** -0.5
    tensors = (q, k_cache, *rest, options["block_table"], options.get("k_scale"), options.get("v_scale"))
    yield _decode, (*tensors, options.get("causal", True), left, right, options.get("softcap", 0.0), scale)


SPEC = OpSpec(
    name="decode_attention", op=decode_attention, reference=reference, base=base, samples=_samples, outputs=("out", "lse"),
    bytes=_bytes, flops=_flops, flat_calls=_flat_calls, autocast=("q",),
)  # fmt: skip
