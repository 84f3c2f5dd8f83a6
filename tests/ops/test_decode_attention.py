"""decode_attention beyond its spec: equality with whole attention, chunks, layouts, isolation, splits, errors."""

import sys

import pytest
import torch

from longvita_kernels import append_kv, backends, decode_attention, testing
from longvita_kernels.ops import _cache


@pytest.fixture(params=("native", "torch", "reference"))
def backend(request):
    backends.use(request.param)


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def _sdpa(q, k, v, causal=True):
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_prefill_in_chunks_equals_whole_attention(backend, chunk):
    q, k, v = torch.randn(50, 4, 32), torch.randn(50, 2, 32), torch.randn(50, 2, 32)
    k_cache, v_cache = torch.full((1, 64, 2, 32), float("nan")), torch.full((1, 64, 2, 32), float("nan"))
    outs = []
    for start in range(0, 50, chunk):
        new = slice(start, min(50, start + chunk))
        n = new.stop - start
        append_kv(k[new], v[new], k_cache, v_cache, _int32(0, n), _int32(start))
        outs.append(decode_attention(q[new], k_cache, v_cache, _int32(0, n), _int32(new.stop)))
    torch.testing.assert_close(torch.cat(outs), _sdpa(q, k, v), rtol=1e-5, atol=2e-6)


def test_a_large_prefill_chunk_crosses_many_row_blocks(backend):
    q, k, v = torch.randn(130, 10, 40), torch.randn(1, 300, 2, 40), torch.randn(1, 300, 2, 40)
    out = decode_attention(q, k, v, _int32(0, 130), _int32(300))
    whole = torch.cat([torch.zeros(170, 10, 40), q])
    torch.testing.assert_close(out, _sdpa(whole, k[0], v[0])[170:], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("length", [511, 512, 513, 1025, 3000])
def test_split_over_a_long_cache(backend, length):
    q, k, v = torch.randn(1, 3, 32), torch.randn(1, 3100, 1, 32), torch.randn(1, 3100, 1, 32)
    k[:, length:], v[:, length:] = float("nan"), float("nan")  # nothing behind the end may be read into a result
    out, lse = decode_attention(q, k, v, _int32(0, 1), _int32(length), return_lse=True)
    torch.testing.assert_close(out, _sdpa(q, k[0, :length], v[0, :length], causal=False), rtol=1e-5, atol=1e-6)
    scores = (q[0].double() @ k[0, :length, 0].double().T) * 32**-0.5
    torch.testing.assert_close(lse[:, 0].double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_pages_and_rows_give_the_same_bits(backend):
    q, k, v = torch.randn(3, 4, 64), torch.randn(2, 24, 2, 64), torch.randn(2, 24, 2, 64)
    table = torch.tensor([[3, 9, 0], [7, 1, 4]], dtype=torch.int32)
    pages = [torch.full((10, 8, 2, 64), float("nan")) for _ in "kv"]
    for page, rows in zip(pages, (k, v), strict=True):
        page[table.long().flatten()] = rows.reshape(6, 8, 2, 64)
    arguments = _int32(0, 1, 3), _int32(17, 24)
    testing.assert_bit_equal(decode_attention(q, *pages, *arguments, block_table=table), decode_attention(q, k, v, *arguments))


def test_a_sequence_does_not_depend_on_its_batch():
    q, k, v = torch.randn(4, 6, 64), torch.randn(3, 1200, 2, 64), torch.randn(3, 1200, 2, 64)
    lengths = (1200, 5, 700)
    together = decode_attention(q, k, v, _int32(0, 1, 2, 4), _int32(*lengths))
    for b, (start, stop) in enumerate(((0, 1), (1, 2), (2, 4))):
        alone = decode_attention(q[start:stop], k[b : b + 1], v[b : b + 1], _int32(0, stop - start), _int32(lengths[b]))
        testing.assert_bit_equal(together[start:stop], alone, name=f"sequence {b}")


def test_bits_do_not_depend_on_threads():
    q, k, v = torch.randn(9, 10, 64), torch.randn(2, 1500, 2, 64), torch.randn(2, 1500, 2, 64)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(decode_attention(q, k, v, _int32(0, 8, 9), _int32(1500, 1499), return_lse=True))
    for out, lse in results[1:]:
        testing.assert_bit_equal(out, results[0][0])
        testing.assert_bit_equal(lse, results[0][1])


def test_queries_without_keys_give_zero(backend):
    q, cache = torch.randn(3, 2, 32), torch.randn(2, 4, 2, 32)
    out, lse = decode_attention(q, cache, cache, _int32(0, 2, 3), _int32(1, 0), return_lse=True)
    assert (out[[0, 2]] == 0).all() and (lse[:, [0, 2]] == -float("inf")).all()
    torch.testing.assert_close(out[1], cache[0, 0])
    assert lse[:, 1].isfinite().all()


@pytest.mark.parametrize("rows", [(2, 0), (0, 4), (3, 0), (3, 4)])
def test_a_cache_without_room(backend, rows):
    """In rows; in pages, of which there are none, or without room, or without a column of the table."""
    q, cache, table = torch.randn(3, 2, 32), torch.randn(*rows, 2, 32), torch.zeros(2, 0 if rows == (3, 4) else 1, dtype=torch.int32)
    table = None if rows == (2, 0) else table
    for return_lse in (True, False):
        found = decode_attention(q, cache, cache, _int32(0, 2, 3), _int32(0, 0), block_table=table, return_lse=return_lse)
        out, lse = found if return_lse else (found, None)
        assert out.shape == q.shape and not out.any()
        assert lse is None or (lse.shape == (2, 3) and (lse == -torch.inf).all())
    message = "uses block 0; expected 0 to -1" if rows == (0, 4) else "sequence 1 has length 1, but its cache holds 0 to 0"
    with pytest.raises(ValueError, match=message):
        decode_attention(q, cache, cache, _int32(0, 2, 3), _int32(0, 1), block_table=table)


def test_windows_beyond_every_number_of_tokens_hide_nothing(backend):
    q, k, v = torch.randn(3, 2, 32), torch.randn(1, 9, 2, 32), torch.randn(1, 9, 2, 32)
    whole = decode_attention(q, k, v, _int32(0, 3), _int32(9), causal=False)
    for window in ((sys.maxsize, sys.maxsize), (sys.maxsize, -1), (-1, sys.maxsize)):
        testing.assert_bit_equal(decode_attention(q, k, v, _int32(0, 3), _int32(9), causal=False, window_size=window), whole)
    # more queries than keys: the first stand before the cache
    q = torch.randn(12, 2, 32)
    for window in ((sys.maxsize, 0), (0, sys.maxsize)):
        open_side = tuple(-1 if limit else 0 for limit in window)
        far, none = (decode_attention(q, k, v, _int32(0, 12), _int32(9), causal=False, window_size=w) for w in (window, open_side))
        testing.assert_bit_equal(far, none)


@pytest.mark.parametrize("dtype", _cache.LARGEST_CODE)
def test_every_code_of_an_8_bit_cache_is_read_right(backend, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # the two NaNs of e4m3
    codes = codes.view(dtype).reshape(8, 1, 1, 32)
    one, q = torch.ones(8, 1, 1), torch.zeros(8, 1, 32)
    # one key per sequence: the output is its value
    out = decode_attention(q, codes, codes, _int32(*range(9)), torch.ones(8, dtype=torch.int32), k_scale=one, v_scale=one)
    torch.testing.assert_close(out, codes[:, 0].float(), rtol=0, atol=0)


def test_nan_of_an_fp8_cache_stays_nan(backend):
    codes = torch.full((1, 1, 1, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    one = torch.ones(1, 1, 1)
    assert decode_attention(torch.ones(1, 1, 32), codes, codes, _int32(0, 1), _int32(1), k_scale=one, v_scale=one).isnan().all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.06)])
def test_quantised_cache_end_to_end_stays_close(backend, dtype, bound):
    q, k, v = torch.randn(2, 4, 64), torch.randn(200, 2, 64), torch.randn(200, 2, 64)
    caches = [torch.zeros(1, 200, 2, 64, dtype=dtype) for _ in "kv"]
    scales = {name: torch.zeros(1, 200, 2) for name in ("k_scale", "v_scale")}
    append_kv(k, v, *caches, _int32(0, 200), _int32(0), **scales)
    out = decode_attention(q, *caches, _int32(0, 2), _int32(200), **scales)
    exact = decode_attention(q, k[None], v[None], _int32(0, 2), _int32(200))
    assert 0 < (out - exact).norm() / exact.norm() < bound


def test_gradients_are_refused():
    cache = torch.randn(1, 4, 2, 32)
    out = decode_attention(torch.randn(1, 2, 32, requires_grad=True), cache, cache, _int32(0, 1), _int32(4))
    with pytest.raises(RuntimeError, match="decode_attention is forward only: it has no gradient. Remedy: call it under torch.no_grad"):
        out.sum().backward()


def test_scratch_is_allocated_through_torch():
    cache = torch.randn(1, 2000, 2, 64)
    with backends.use("native"), testing.poisoned_empty() as shapes:
        out = decode_attention(torch.randn(1, 2, 64), cache, cache, _int32(0, 1), _int32(2000))
    assert out.isfinite().all()
    assert max(shape[0] for shape in shapes if len(shape) == 1) > 1000


def _call(**change):
    arguments = {
        "q": torch.zeros(3, 4, 32), "k_cache": torch.zeros(2, 4, 2, 32), "v_cache": torch.zeros(2, 4, 2, 32),
        "cu_seqlens_q": _int32(0, 2, 3), "cache_seqlens": _int32(4, 3), **change,
    }  # fmt: skip
    return decode_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 128)}, r"q has shape \(3, 128\); expected \(T, Hq, D\)"),
        ({"q": torch.zeros(3, 3, 32)}, r"q has 3 heads, k_cache 2; expected a multiple"),
        ({"q": torch.zeros(3, 4, 36)}, r"q has head dimension 36; expected a multiple of 8"),
        ({"q": torch.zeros(3, 4, 64)}, r"k_cache has shape .*; expected \(B, S, Hkv, D\) = \(2, 'any', 'any', 64\)"),
        ({"q": torch.zeros(3, 4, 64)[..., ::2]}, r"q has stride 2 in its last dimension"),
        ({"cache_seqlens": _int32(5, 3)}, r"cache_seqlens: sequence 0 has length 5, but its cache holds 0 to 4"),
        ({"cache_seqlens": _int32(4, -3)}, r"cache_seqlens: sequence 1 has length -3"),
        ({"cu_seqlens_q": _int32(0, 2, 2)}, r"cu_seqlens_q ends at 2 but there are 3 tokens"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 3], dtype=torch.int16)}, r"cu_seqlens_q has dtype torch.int16; expected int32"),
        ({"block_table": torch.tensor([[0], [-1]], dtype=torch.int32)}, r"block_table: sequence 1 uses block -1; expected 0 to 1"),
        ({"k_cache": torch.zeros(2, 4, 2, 32, dtype=torch.int32)}, r"k_cache has dtype int32; expected one of"),
        ({"window_size": (-5, -1)}, r"window_size is \(-5, -1\); expected \(left, right\), two ints of at least -1"),
        ({"window_size": (5,)}, r"window_size is \(5,\); expected \(left, right\)"),
        ({"softcap": -1}, r"softcap is -1; expected a finite number above 0, or 0"),
        ({"softcap": float("nan")}, r"softcap is nan; expected a finite number"),
        ({"softmax_scale": float("nan")}, r"softmax_scale is nan; expected a finite number"),
    ],
)
def test_wrong_arguments_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        _call(**change)
