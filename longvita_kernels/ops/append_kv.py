"""Write new keys and values into a cache, in place.

    cache[b, cache_seqlens[b] + i] = x[cu_seqlens_q[b] + i]        for every new token i of sequence b

8-bit caches are quantised per token and head, symmetrically:  scale = max|x| / top,  code = round(x / scale),  top = 127 (int8) or 448
(float8_e4m3fn; its rounding is the format's). A row of zeros gets scale 0 and codes 0. Layouts: `_cache.py`.

(T, Hkv, D): k, v. T new tokens of all sequences, Hkv key/value heads, D head dimension.
"""

import torch
from torch.autograd.graph import increment_version

from longvita_kernels import backends, native
from longvita_kernels.ops import _cache, _common
from longvita_kernels.spec import OpSpec, SampleInput, nbytes


def append_kv(k, v, k_cache, v_cache, cu_seqlens_q, cache_seqlens, *, block_table=None, k_scale=None, v_scale=None):
    """Append new keys and values to the sequences of a cache; writes k_cache, v_cache and, for an 8-bit cache, k_scale and v_scale.

    k, v              (T, Hkv, D) float32, bfloat16 or float16; last dimension dense
    k_cache, v_cache  (B, S, Hkv, D), or (n_blocks, block, Hkv, D) with `block_table`; float32, bfloat16, float16, int8 or float8_e4m3fn
    cu_seqlens_q      (B + 1,) int32: sequence b brings tokens cu_seqlens_q[b] to cu_seqlens_q[b + 1]; none is legal
    cache_seqlens     (B,) int32: tokens that are in the cache BEFORE this call. It is not changed; add the new tokens afterwards
                      (the sum is what `decode_attention` wants)
    block_table       (B, n) int32 block numbers; unused entries may hold anything
    k_scale, v_scale  float32, the cache's shape without D; required with an 8-bit cache, forbidden with another
    Returns None. No gradient flows through the cache. Raises ValueError for arguments that do not fit each other or the cache.
    """
    cu_seqlens_q, cache_seqlens = _common.as_offsets("cu_seqlens_q", cu_seqlens_q), _common.as_offsets("cache_seqlens", cache_seqlens)
    if k.dim() != 3 or v.shape != k.shape or not _common.common_case(k, v):
        _common.check_shape("k", k, (None, None, None), "(T, Hkv, D)")
        _common.check_float("k", k)
        _common.check_shape("v", v, k.shape, "the shape of k")
        _common.check_like("v", v, "k", k)
        _common.check_last_stride("k", k)
        _common.check_last_stride("v", v)
    _cache.check_cache(("k", k), k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
        _check_writable(name, cache)
    if k_cache.shape[2] != k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads but k_cache has {k_cache.shape[2]}; they must agree")
    tensors = (_common.plain(k), _common.plain(v), k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale)
    _common.call(_append, _append_impl, tensors)


def _check_writable(name, cache):
    if cache is None:
        return
    if cache.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but it is written in place and takes none. Remedy: {name}.detach()")
    if not cache.is_contiguous() and any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape, strict=True)):
        raise ValueError(f"{name} is expanded: several of its elements are the same memory. Remedy: {name}.contiguous()")


def write_reference(k, v, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table=None, k_scale=None, v_scale=None):
    """The definition in plain torch: writes the caches (and scales) it is given. Nothing synchronises; numbers out of range, which nobody
    may look at on a GPU, are clamped."""
    token_T, block = torch.arange(k.shape[0], device=k.device, dtype=torch.int32), k_cache.shape[1]
    sequence_T = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token_T, right=True).clamp_(max=len(cache_seqlens) - 1)
    capacity = block if block_table is None else block * block_table.shape[1]
    position_T = (cache_seqlens[sequence_T] + token_T - cu_seqlens_q[sequence_T]).long().clamp_(0, capacity - 1)
    row_T, column_T = sequence_T, position_T % block
    if block_table is not None:
        row_T = block_table[sequence_T, position_T // block].long().clamp_(0, k_cache.shape[0] - 1)
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is None:
            cache[row_T, column_T] = x.to(cache.dtype)
        else:
            codes, factors = _cache.quantise(x, cache.dtype)
            cache.view(torch.uint8)[row_T, column_T] = codes.view(torch.uint8)  # fp8 has no indexed assignment
            scale[row_T, column_T] = factors.to(scale.dtype)


# ------------------------------------------------------------------------------------------------------------------------------- flat op


native_cannot = _cache.native_cannot


def _triton():
    from longvita_kernels.triton import append_kv

    return append_kv


def _append_impl(k, v, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale):
    backend = backends.choose("append_kv", k, native_cannot(k_cache=k_cache))
    nothing = k.shape[0] == 0 or _cache.holds_nothing(k_cache, block_table)
    if backend != "native" or nothing:  # the native kernel does so itself
        _cache.check_lengths(cu_seqlens_q, cache_seqlens, k_cache, block_table, k.shape[0], appended=True)
    if nothing:
        return
    if backend in ("reference", "torch"):  # the definition is the best way inside torch: each of the two is read and written once
        with torch.no_grad():
            write_reference(k, v, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale)
        return
    cu_seqlens_q, cache_seqlens = cu_seqlens_q.contiguous(), cache_seqlens.contiguous()
    if backend == "triton":
        _triton().append(k, v, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale)
    else:
        native.load().append_kv(
            native.dtype_code(k.dtype), k.shape[0], k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(),
            *_cache.native_arguments(k_cache, v_cache, block_table, k_scale, v_scale),
            cache_seqlens.shape[0], cu_seqlens_q.data_ptr(), cache_seqlens.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    written = (k_cache, v_cache) if k_scale is None else (k_cache, v_cache, k_scale, v_scale)
    # so that autograd, which sees no kernel write, refuses what it has saved of them before (inference tensors have no version)
    increment_version([x for x in written if not x.is_inference()])


def _append_fake(k, v, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale):
    return None


_append = _common.define_op(
    "append_kv",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cu_seqlens_q, Tensor cache_seqlens, Tensor? block_table, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()",
    _append_impl, _append_fake,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------------------- spec


def _copying(write):
    """`write` as a function without side effects, for the spec: copies of the caches, written, dequantised."""

    def written(k, v, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table=None, k_scale=None, v_scale=None):
        caches = [k_cache.clone(), v_cache.clone()]
        scales = [scale if scale is None else scale.clone() for scale in (k_scale, v_scale)]
        write(k, v, *caches, cu_seqlens_q, cache_seqlens, block_table=block_table, k_scale=scales[0], v_scale=scales[1])
        return tuple(c if s is None else c.to(s.dtype) * s.unsqueeze(-1) for c, s in zip(caches, scales, strict=True))

    return written


def _samples(dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def make(label, new, before, rows, *, heads=2, dim=40, cache_dtype=None, table=None):
        cache_dtype = cache_dtype or dtype
        tokens, quantised = sum(new), cache_dtype in _cache.LARGEST_CODE
        qkv = random(tokens, heads, 3 * dim).to(dtype)
        k, v = qkv[..., dim : 2 * dim], qkv[..., 2 * dim :]
        if tokens:
            k[0, 0] = 0  # a row of zeros must not divide by its scale
        shape = (*rows, heads, dim)
        args = [k, v, *((20 * random(*shape) if quantised else random(*shape)).to(cache_dtype) for _ in "kv")]
        args += [torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32), torch.tensor(before, dtype=torch.int32)]
        kwargs = {"block_table": table}
        if quantised:
            kwargs |= {name: random(*shape[:3]).abs() for name in ("k_scale", "v_scale")}
        return SampleInput(label, tuple(a.to(device) if a.device.type != device else a for a in args), kwargs)

    table = torch.tensor([[4, 0, -1], [2, 5, 1]], dtype=torch.int32, device=device)
    yield make("rows", (3, 0, 1), (0, 4, 6), (3, 7))
    yield make("paged", (5, 7), (2, 3), (6, 4), table=table)
    yield make("int8 rows", (3, 1), (0, 6), (2, 7), cache_dtype=torch.int8)
    yield make("int8 paged", (5, 7), (2, 3), (6, 4), cache_dtype=torch.int8, table=table)
    yield make("fp8 rows", (3, 1), (0, 6), (2, 7), dim=64, cache_dtype=torch.float8_e4m3fn)
    yield make("bfloat16 cache", (3, 1), (0, 6), (2, 7), cache_dtype=torch.bfloat16)
    yield make("no new tokens", (0,), (3,), (1, 5))


def _bytes(sample):
    k, v, k_cache = sample.args[:3]
    scales = 2 * 4 * k.shape[0] * k.shape[1] if sample.kwargs.get("k_scale") is not None else 0
    return nbytes(k, v) + 2 * k.numel() * k_cache.element_size() + scales


def _flops(sample):
    return 4 * sample.args[0].numel() if sample.kwargs.get("k_scale") is not None else 0


def _flat_calls(sample):
    k, v, k_cache, v_cache, cu_seqlens_q, cache_seqlens = sample.args
    if k_cache.dtype == torch.float8_e4m3fn:
        return  # opcheck cannot compare fp8 tensors; int8 takes the same way through the op
    scales = [None if sample.kwargs.get(n) is None else sample.kwargs[n].clone() for n in ("k_scale", "v_scale")]
    yield _append, (k, v, k_cache.clone(), v_cache.clone(), cu_seqlens_q, cache_seqlens, sample.kwargs["block_table"], *scales)


_written = _copying(write_reference)
SPEC = OpSpec(
    name="append_kv", op=_copying(append_kv), reference=_written, base=_written, samples=_samples, outputs=("k_cache", "v_cache"),
    bytes=_bytes, flops=_flops, flat_calls=_flat_calls, smooth=False,
)  # fmt: skip
