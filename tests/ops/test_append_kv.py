"""append_kv beyond its spec: what is written, what is not, quantisation bit by bit, errors."""

import pytest
import torch

from longvita_kernels import append_kv, backends, testing

FP8 = torch.float8_e4m3fn


@pytest.fixture(params=("native", "reference"), autouse=True)
def backend(request):
    backends.use(request.param)


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def _cache(*shape, dtype=torch.float32):
    return torch.full(shape, 7.0).to(dtype), torch.full(shape, 9.0).to(dtype)


def test_only_the_new_places_are_written():
    k, v = torch.randn(4, 2, 32), torch.randn(4, 2, 32)
    k_cache, v_cache = _cache(2, 6, 2, 32)
    assert append_kv(k, v, k_cache, v_cache, _int32(0, 3, 4), _int32(1, 5)) is None
    for new, cache, untouched in ((k, k_cache, 7.0), (v, v_cache, 9.0)):
        torch.testing.assert_close(cache[0, 1:4], new[:3], rtol=0, atol=0)
        torch.testing.assert_close(cache[1, 5], new[3], rtol=0, atol=0)
        assert (cache[0, :1] == untouched).all() and (cache[0, 4:] == untouched).all() and (cache[1, :5] == untouched).all()


def test_paged_and_row_caches_hold_the_same():
    k, v = torch.randn(9, 1, 40), torch.randn(9, 1, 40)
    rows, pages = _cache(2, 12, 1, 40), _cache(6, 4, 1, 40)
    table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
    lengths = _int32(2, 0)
    append_kv(k, v, *rows, _int32(0, 5, 9), lengths)
    append_kv(k, v, *pages, _int32(0, 5, 9), lengths, block_table=table)
    for row, page in zip(rows, pages, strict=True):
        testing.assert_bit_equal(page[table.long()].flatten(1, 2), row)
    assert lengths.tolist() == [2, 0]


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_floating_caches_are_rounded_once(cache_dtype):
    k, v = torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    k_cache, v_cache = _cache(1, 4, 2, 32, dtype=cache_dtype)
    append_kv(k, v, k_cache, v_cache, _int32(0, 3), _int32(1))
    testing.assert_bit_equal(k_cache[0, 1:], k.to(cache_dtype))
    testing.assert_bit_equal(v_cache[0, 1:], v.to(cache_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cache_dtype", "top"), [(torch.int8, 127.0), (FP8, 448.0)])
def test_quantisation_bit_by_bit(dtype, cache_dtype, top):
    magnitudes = torch.logspace(-4, 3, 64).reshape(64, 1, 1)
    x = (magnitudes * torch.randn(64, 3, 48)).to(dtype)
    x[5, 1] = 0.0
    x[6, 0, 0] = 20 * x[6, 0].abs().max()
    k_cache, v_cache = _cache(1, 64, 3, 48, dtype=cache_dtype)
    scales = torch.full((2, 1, 64, 3), -1.0)
    append_kv(x, x.flip(0), k_cache, v_cache, _int32(0, 64), _int32(0), k_scale=scales[0], v_scale=scales[1])
    expected_scale = x.float().abs().amax(-1) / top
    codes = x.float() / torch.where(expected_scale > 0, expected_scale, 1.0).unsqueeze(-1)
    expected = (codes.round() if cache_dtype == torch.int8 else codes.clamp(-top, top)).to(cache_dtype)
    testing.assert_bit_equal(scales[0, 0], expected_scale)
    testing.assert_bit_equal(k_cache[0], expected)
    testing.assert_bit_equal(v_cache[0].view(torch.uint8), expected.flip(0).view(torch.uint8))
    assert (k_cache[0, 5, 1].float() == 0).all() and scales[0, 0, 5, 1] == 0
    step = expected_scale.unsqueeze(-1) * (1.0 if cache_dtype == torch.int8 else 32.0)
    assert ((k_cache[0].float() * expected_scale.unsqueeze(-1) - x.float()).abs() <= 0.5001 * step).all()


def test_caches_may_be_views():
    both = torch.zeros(2, 5, 2, 2, 32)
    k, v = torch.randn(2, 2, 32), torch.randn(2, 2, 32)
    append_kv(k, v, both[..., 0, :], both[..., 1, :], _int32(0, 1, 2), _int32(4, 0))
    torch.testing.assert_close(both[0, 4, :, 0], k[0], rtol=0, atol=0)
    torch.testing.assert_close(both[1, 0, :, 1], v[1], rtol=0, atol=0)
    assert int((both != 0).sum()) == k.numel() + v.numel()


def test_a_captured_graph_writes_in_place():
    torch._dynamo.reset()
    k, v = torch.randn(2, 1, 32), torch.randn(2, 1, 32)
    eager, compiled = _cache(1, 3, 1, 32), _cache(1, 3, 1, 32)
    append_kv(k, v, *eager, _int32(0, 2), _int32(1))
    torch.compile(append_kv, fullgraph=True, backend="aot_eager")(k, v, *compiled, _int32(0, 2), _int32(1))
    for a, b in zip(eager, compiled, strict=True):
        testing.assert_bit_equal(a, b)
    assert (compiled[0][0, 1:] == k).all()


def test_keys_that_need_a_gradient_are_stored_without_it():
    k = torch.randn(1, 1, 32, requires_grad=True)
    caches = _cache(1, 2, 1, 32)
    append_kv(k, k, *caches, _int32(0, 1), _int32(0))
    assert not caches[0].requires_grad and (caches[0][0, 0] == k).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_writing_is_seen_by_autograd(dtype):
    k, caches = torch.ones(1, 1, 32), _cache(1, 2, 1, 32, dtype=dtype)
    scales = {} if dtype == torch.float32 else {"k_scale": torch.ones(1, 2, 1), "v_scale": torch.ones(1, 2, 1)}
    x = torch.ones(1, 2, 1, requires_grad=True)
    saved = [(x.unsqueeze(-1) * cache).sum() for cache in caches] if dtype == torch.float32 else [(x * s).sum() for s in scales.values()]
    before = [tensor._version for tensor in (*caches, *scales.values())]
    append_kv(k, k, *caches, _int32(0, 1), _int32(1), **scales)
    assert all(tensor._version > old for tensor, old in zip((*caches, *scales.values()), before, strict=True))
    for result in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


def test_tensors_of_inference_mode_have_no_version_to_count():
    with torch.inference_mode():
        caches = _cache(1, 2, 1, 32)
        append_kv(torch.ones(1, 1, 32), torch.ones(1, 1, 32), *caches, _int32(0, 1), _int32(1))
    assert (caches[0][0, 1] == 1).all() and (caches[0][0, 0] == 7).all()


def _call(**change):
    arguments = {
        "k": torch.zeros(3, 2, 32), "v": torch.zeros(3, 2, 32), "k_cache": torch.zeros(2, 4, 2, 32), "v_cache": torch.zeros(2, 4, 2, 32),
        "cu_seqlens_q": _int32(0, 2, 3), "cache_seqlens": _int32(1, 3), **change,
    }  # fmt: skip
    append_kv(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 64)}, r"k has shape \(3, 64\); expected \(T, Hkv, D\)"),
        ({"v": torch.zeros(3, 2, 40)}, r"v has shape \(3, 2, 40\); expected the shape of k"),
        ({"k_cache": torch.zeros(3, 4, 2, 32)}, r"k_cache has shape \(3, 4, 2, 32\); expected \(B, S, Hkv, D\) = \(2, 'any', 'any', 32\)"),
        ({"v_cache": torch.zeros(2, 5, 2, 32)}, r"v_cache has shape .* expected the shape of k_cache"),
        ({"k_cache": torch.zeros(2, 4, 1, 32), "v_cache": torch.zeros(2, 4, 1, 32)}, r"k has 2 heads but k_cache has 1"),
        ({"cache_seqlens": torch.tensor([1.0, 3.0])}, r"cache_seqlens has dtype torch.float32; expected int32. Remedy: cache_seqlens.to"),
        ({"cache_seqlens": _int32(1)}, r"cache_seqlens has shape \(1,\); expected \(B,\) = \(2,\)"),
        ({"cache_seqlens": _int32(3, 3)}, r"sequence 0 has 3 tokens in the cache and 2 new ones, but its cache holds 0 to 4"),
        ({"cache_seqlens": _int32(-1, 3)}, r"sequence 0 has -1 tokens in the cache"),
        ({"cu_seqlens_q": _int32(0, 2, 4)}, r"cu_seqlens_q ends at 4 but there are 3 tokens"),
        ({"cu_seqlens_q": _int32(0, 4, 3)}, r"cu_seqlens_q falls from 4 to 3 at index 2"),
        ({"cu_seqlens_q": _int32(1, 2, 3)}, r"cu_seqlens_q starts at 1; expected 0"),
        ({"k_scale": torch.zeros(2, 4, 2), "v_scale": torch.zeros(2, 4, 2)}, r"dtype torch.float32 and k_scale and v_scale was given"),
        ({"block_table": _int32(0, 1)}, r"block_table has shape \(2,\); expected \(B, n\)"),
        ({"k_cache": torch.zeros(2, 0, 2, 32), "v_cache": torch.zeros(2, 0, 2, 32)}, r"sequence 0 has 1 tokens .* holds 0 to 0"),
        ({"block_table": torch.zeros(2, 0, dtype=torch.int32)}, r"sequence 0 has 1 tokens in the cache and 2 new ones.* holds 0 to 0"),
        ({"block_table": torch.tensor([[0], [2]], dtype=torch.int32)}, r"block_table: sequence 1 uses block 2; expected 0 to 1"),
    ],
)
def test_wrong_arguments_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        _call(**change)


def test_a_cache_without_room_takes_nothing():
    k, cache = torch.zeros(1, 2, 32), torch.zeros(1, 0, 2, 32)
    append_kv(k[:0], k[:0], cache, cache, _int32(0, 0), _int32(0))
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens in the cache and 1 new ones, but its cache holds 0 to 0"):
        append_kv(k, k, cache, cache, _int32(0, 1), _int32(0))


def test_an_8_bit_cache_needs_both_scales():
    caches = {"k_cache": torch.zeros(2, 4, 2, 32, dtype=torch.int8), "v_cache": torch.zeros(2, 4, 2, 32, dtype=torch.int8)}
    with pytest.raises(ValueError, match="dtype torch.int8 and no scale was given; expected k_scale and v_scale"):
        _call(**caches)
    with pytest.raises(ValueError, match="and k_scale was given"):
        _call(**caches, k_scale=torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match=r"v_scale has shape \(2, 4\); expected the shape of k_cache without D = \(2, 4, 2\)"):
        _call(**caches, k_scale=torch.zeros(2, 4, 2), v_scale=torch.zeros(2, 4))
