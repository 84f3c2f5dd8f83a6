"""The key/value cache: growth, continuation of several sequences at once, failed passes, error messages."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from longvita import Batch, LongVita, presets
from longvita.model.cache import DECODE_QUERIES, KVCache

TINY = presets["tiny"]


@pytest.fixture(scope="module")
def model():
    return LongVita(TINY).init_weights(0, 0.15).requires_grad_(False)


def documents(*lengths):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 512, (n,), generator=generator).tolist() for n in lengths]


def cached(model, cache, pieces):
    """One pass that appends pieces[i] to sequence i."""
    batch = Batch.from_ids(pieces)
    offsets = [start for start, piece in zip(cache.lengths, pieces, strict=True) for _ in piece]
    return model(dataclasses.replace(batch, position_ids=batch.position_ids + torch.tensor(offsets, dtype=torch.int64)), cache)


@pytest.mark.parametrize("splits", [(0, 13, 20), (0, 1, 2, 5, 20), (0, 11, 12, 20), (0, 20)])
def test_any_split_gives_the_hidden_states_of_one_pass(model, splits):
    ids = documents(20, 33, 7)
    whole = model(Batch.from_ids(ids)).split([20, 33, 7])
    cache = KVCache(TINY.text, 3, block=4)
    outputs = [[], [], []]
    for start, end in pairwise(splits):
        pieces = [row[len(row) * start // 20 : len(row) * end // 20] for row in ids]
        parts = cached(model, cache, pieces).split([len(piece) for piece in pieces])
        for seen, part in zip(outputs, parts, strict=True):
            seen.append(part)
    assert cache.lengths == [20, 33, 7]
    for seen, expected in zip(outputs, whole, strict=True):
        torch.testing.assert_close(torch.cat(seen), expected, rtol=1e-4, atol=1e-4)


def test_sequences_may_start_continue_and_rest_in_one_pass(model):
    ids = documents(40, 30, 25, 6)
    cache = KVCache(TINY.text, 4)
    cached(model, cache, [ids[0][:20], [], ids[2][:5], ids[3]])
    hidden = cached(model, cache, [ids[0][20:], ids[1], ids[2][5:], []])  # long continuations beside a fresh prompt
    assert cache.lengths == [40, 30, 25, 6] and max(len(row) for row in ids) > DECODE_QUERIES
    expected = model(Batch.from_ids(ids))
    rows = torch.cat([torch.arange(20, 40), torch.arange(40, 70), torch.arange(75, 95)])
    torch.testing.assert_close(hidden, expected[rows], rtol=1e-4, atol=1e-4)


def test_it_grows_in_blocks_and_keeps_what_it_has():
    cache = KVCache(TINY.text, 2, block=16)
    assert cache.capacity == 0 and cache.nbytes == 0
    cache.reserve(5)
    assert cache.capacity == 16
    assert cache.nbytes == 2 * 16 * TINY.kv_bytes_per_token("float32")
    cache.keys[3][:, :7] = torch.arange(7.0)[:, None, None]
    cache.lengths = [7, 3]
    cache.reserve(17)
    assert cache.capacity == 32 and cache.keys[3].shape == (2, 32, 2, 32)
    assert (cache.keys[3][:, :7] == torch.arange(7.0)[:, None, None]).all()
    before = cache.keys[0]
    cache.reserve(32)
    assert cache.keys[0] is before
    cache.reserve(1000)
    assert cache.capacity == 1008


def test_dtype_follows_the_request():
    assert KVCache(TINY.text, 1, capacity=1, dtype=torch.bfloat16).nbytes == 256 * TINY.kv_bytes_per_token("bfloat16")


def test_a_failed_pass_changes_nothing(model):
    [ids] = documents(12)
    cache = KVCache(TINY.text, 1)
    cached(model, cache, [ids[:6]])
    step = cache.begin([4])
    assert cache.lengths == [6] and step.after == [10]
    with pytest.raises(ValueError, match="input_ids must lie in"):
        cached(model, cache, [[700]])
    hidden = cached(model, cache, [ids[6:]])
    torch.testing.assert_close(hidden, model(Batch.from_ids([ids]))[6:], rtol=1e-4, atol=1e-4)


def test_errors_teach(model):
    cache = KVCache(TINY.text, 2)
    with pytest.raises(ValueError, match="cache holds 2 sequences, the batch has 1 documents: .* empty where nothing is new"):
        model(Batch.from_ids([[1, 2]]), cache)
    with pytest.raises(ValueError, match="at least 1 and capacity at least 0, got 0, 256 and 0"):
        KVCache(TINY.text, 0)
