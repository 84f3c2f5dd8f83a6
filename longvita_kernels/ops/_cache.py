"""The key/value cache that `append_kv` and `decode_attention` share: its layouts, its checks, its quantisation.

Two layouts of keys (values alike), Hkv heads of dimension D:
  rows    (B, S, Hkv, D)             sequence b has row b
  paged   (n_blocks, block, Hkv, D)  with block_table (B, n) int32: token t of sequence b lies in block block_table[b, t // block],
                                     at t % block
8-bit caches (int8, float8_e4m3fn) hold code = x / scale with one float32 scale per token and head, of the cache's shape without D.
"""

import torch

from longvita_kernels import native
from longvita_kernels.ops import _common
from longvita_kernels.spec import FLOAT_DTYPES

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
CACHE_DTYPES = (*FLOAT_DTYPES, torch.float64, *LARGEST_CODE)


def fits(tokens, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale):
    """Sufficient for what `check_cache` says, and several times cheaper: a cache in rows without scales, everything dense."""
    shape = k_cache.shape
    return (
        block_table is None and k_scale is None and v_scale is None and _common.common_case(k_cache, v_cache) and len(shape) == 4
        and shape == v_cache.shape and tokens.is_cpu and shape[3] == tokens.shape[2] and _common.common_offsets(cu_seqlens_q, cache_seqlens)
        and cache_seqlens.shape[0] == shape[0] == cu_seqlens_q.shape[0] - 1
    )  # fmt: skip


def check_cache(anchor, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale):
    """Shapes, dtypes, devices and strides; `anchor` is (name, tensor) with the tokens (T, heads, D). Values: `check_lengths`."""
    name, tokens = anchor
    if fits(tokens, k_cache, v_cache, cu_seqlens_q, cache_seqlens, block_table, k_scale, v_scale):
        return
    _common.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, tokens.device)
    batch, dim = cu_seqlens_q.shape[0] - 1, tokens.shape[2]
    if block_table is None:
        _common.check_shape("k_cache", k_cache, (batch, None, None, dim), "(B, S, Hkv, D)")
    else:
        _common.check_shape("k_cache", k_cache, (None, None, None, dim), "(n_blocks, block, Hkv, D)")
    _common.check_shape("v_cache", v_cache, k_cache.shape, "the shape of k_cache")
    _common.check_dtype("k_cache", k_cache, CACHE_DTYPES)
    _common.check_like("v_cache", v_cache, "k_cache", k_cache)
    _common.check_device("k_cache", k_cache, name, tokens)
    _common.check_last_stride("k_cache", k_cache)
    _common.check_last_stride("v_cache", v_cache)
    _check_int32("cache_seqlens", cache_seqlens, (batch,), "(B,)", tokens)
    if block_table is not None:
        _check_int32("block_table", block_table, (batch, None), "(B, n)", tokens)
    _check_scales(k_cache, k_scale, v_scale)


def _check_int32(name, tensor, shape, legend, tokens):
    _common.check_shape(name, tensor, shape, legend)
    if tensor.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected int32. Remedy: {name}.to(torch.int32)")
    _common.check_device(name, tensor, "the tokens", tokens)
    _common.check_last_stride(name, tensor)


def _check_scales(k_cache, k_scale, v_scale):
    if k_scale is None and v_scale is None and k_cache.dtype not in LARGEST_CODE:  # these checks run on every call: the common case
        return
    if (k_cache.dtype in LARGEST_CODE) != (k_scale is not None) or (k_scale is None) != (v_scale is None):
        given = [name for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)) if scale is not None]
        raise ValueError(
            f"the cache has dtype {k_cache.dtype} and {' and '.join(given) or 'no scale'} was given; expected k_scale and v_scale with an "
            "int8 or float8_e4m3fn cache, and neither with another"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            _common.check_shape(name, scale, k_cache.shape[:3], "the shape of k_cache without D")
            _common.check_dtype(name, scale, (torch.float32,))
            _common.check_device(name, scale, "k_cache", k_cache)


def holds_nothing(k_cache, block_table):
    """Whether no sequence can have a token: then there may be no address to give to a kernel."""
    return k_cache.numel() == 0 or (block_table is not None and block_table.numel() == 0)


def check_lengths(cu_seqlens_q, cache_seqlens, k_cache, block_table, tokens, *, appended):
    """The values: every sequence fits its cache, every block it uses exists. `appended`: the lengths do not count the new tokens yet."""
    _common.check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, tokens)
    if not _common.checks_values(cache_seqlens):
        return
    offsets, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    block = k_cache.shape[1]
    capacity = block if block_table is None else block * block_table.shape[1]
    for b, length in enumerate(lengths):
        end = length + (offsets[b + 1] - offsets[b] if appended else 0)
        if length < 0 or end > capacity:
            what = f"{length} tokens in the cache and {end - length} new ones" if appended else f"length {length}"
            remedy = "use a larger cache or more blocks"
            raise ValueError(f"cache_seqlens: sequence {b} has {what}, but its cache holds 0 to {capacity}; {remedy}")
        if block_table is not None and end:
            used = block_table[b, : -(-end // block)].tolist()
            bad = next((i for i in used if not 0 <= i < k_cache.shape[0]), None)
            if bad is not None:
                raise ValueError(f"block_table: sequence {b} uses block {bad}; expected 0 to {k_cache.shape[0] - 1}")


def gather(cache, scale, block_table, b, length, dtype):
    """First `length` tokens of sequence b as (length, Hkv, D), dequantised, in `dtype` (for 8 bits the product is formed in float32)."""
    blocks = None if block_table is None else block_table[b, : -(-length // max(cache.shape[1], 1))].long()
    values = cache[b][:length] if block_table is None else cache[blocks].flatten(0, 1)[:length]
    if scale is None:
        return values.to(dtype)
    factors = scale[b] if block_table is None else scale[blocks].flatten(0, 1)
    wide = torch.promote_types(dtype, torch.float32)
    return (values.to(wide) * factors[:length, :, None].to(wide)).to(dtype)


def take(cache, scale, block_table, sequence_N, token_NL, dtype):
    """Tokens token_NL of the sequences sequence_N by head, (N, Hkv, L, D), dequantised as by `gather`: what a batched product reads.
    Nothing is read back; block numbers are clamped."""
    row, column, block = sequence_N[:, None, None], token_NL[:, None], cache.shape[1]
    if block_table is not None:
        row, column = block_table[sequence_N[:, None], token_NL // block].long().clamp_(0, cache.shape[0] - 1)[:, None], column % block
    if scale is None:
        return _rows(cache, row, column).to(dtype)
    codes = _rows(cache.view(torch.uint8), row, column).view(cache.dtype)  # bytes, as fp8 is not indexed everywhere
    wide = torch.promote_types(dtype, torch.float32)
    return codes.to(wide).mul_(_rows(scale, row, column).unsqueeze(-1)).to(dtype)


def _rows(x, row, column):
    """x[row, column] by head, (N, Hkv, L, …). Of one block of memory whole rows can be copied, six times as fast on a CPU."""
    blocks, block, heads = x.shape[:3]
    head = torch.arange(heads, device=x.device)[:, None]
    if x.stride(1) == heads * x.stride(2) and (x.stride(0) == block * x.stride(1) or blocks == 1):
        at = (row * block + column) * heads + head
        return x.flatten(0, 2).index_select(0, at.flatten()).unflatten(0, at.shape)
    return x[row, column, head]


def quantise(x, dtype):
    """x (..., D) → codes in `dtype` and scale (...) float32: symmetric, the largest magnitude of a row becomes the largest code.

    A row of zeros gets scale 0 and codes 0."""
    top = LARGEST_CODE[dtype]
    wide = x.to(_common.compute_dtype(x))
    scale = wide.abs().amax(-1) / top
    codes = (wide / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)).clamp(-top, top)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def native_cannot(*, k_cache=None, **_):
    """Why the native kernels cannot take a call with these arguments, or None."""
    return "the native kernels take no float64 cache" if k_cache is not None and k_cache.dtype == torch.float64 else None


def native_arguments(k_cache, v_cache, block_table, k_scale, v_scale):
    """(dtype code, sizes and table, keys, values) as csrc/bind_kv_cache.h reads them."""
    table = (0, 0, 0) if block_table is None else (block_table.data_ptr(), block_table.stride(0), block_table.shape[1])
    return native.dtype_code(k_cache.dtype), (*k_cache.shape, *table), _side(k_cache, k_scale), _side(v_cache, v_scale)


def _side(cache, scale):
    strides = cache.stride()
    if scale is None:
        return cache.data_ptr(), strides[0], strides[1], strides[2], 0, 0, 0, 0
    return cache.data_ptr(), strides[0], strides[1], strides[2], scale.data_ptr(), *scale.stride()
