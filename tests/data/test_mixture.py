"""Ratios, caps and shuffles."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longvita.data.mixture import Mixture, Source
from longvita.data.schema import Sample


def rows(mixture, epoch):
    return [(source.name, index) for source, index, _ in (mixture[row] for row in mixture.order(epoch))]


@pytest.mark.parametrize(
    "size, ratio, num, count",
    [
        (30, 1, None, 30),
        (30, 0.1, None, 3),
        (30, 2.5, None, 75),
        (30, 1, 7, 7),
        (30, 0.5, 20, 15),
        (7, 0.1, None, 0),
        (30, 3, 40, 40),
        (5, 0, None, 0),
        (5, 1, 0, 0),
    ],
)
def test_rows_per_epoch(size, ratio, num, count):
    assert Source(range(size), ratio, num).rows_per_epoch == count


@settings(max_examples=60)
@given(size=st.integers(1, 20), ratio=st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0]), epochs=st.integers(1, 6), seed=st.integers(0, 3))
def test_rows_are_dealt_evenly_over_epochs(size, ratio, epochs, seed):
    source = Source(range(size), ratio, name="a")
    mixture = Mixture([source, Source(range(3), name="b")], seed)
    dealt = Counter()
    for epoch in range(epochs):
        names = rows(mixture, epoch)
        assert len(names) == source.rows_per_epoch + 3 and sum(name == "b" for name, _ in names) == 3
        assert {index for name, index in names if name == "b"} == {0, 1, 2}
        dealt.update(index for name, index in names if name == "a")
    if source.rows_per_epoch:
        counts = [dealt[i] for i in range(size)]
        assert max(counts) - min(counts) <= 1, "none a second time before every other came once"


def test_each_epoch_is_a_permutation_of_its_own():
    mixture = Mixture(Source(range(100)), seed=3)
    first, second = mixture.order(0), mixture.order(1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second) and not np.array_equal(first, np.arange(100))
    assert np.array_equal(first, Mixture(Source(range(100)), seed=3).order(0))
    assert not np.array_equal(first, Mixture(Source(range(100)), seed=4).order(0))


def test_the_shuffle_is_pinned():
    """A resumed run must see the same order after an upgrade of numpy."""
    assert Mixture(Source(range(10)), seed=0).order(0).tolist() == [3, 7, 6, 0, 8, 4, 1, 2, 5, 9]


def test_a_part_differs_between_epochs_until_all_came():
    mixture = Mixture(Source(range(10), 0.5), seed=0)
    assert sorted([*mixture.order(0), *mixture.order(1)]) == list(range(10))


def test_what_counts_as_one_source():
    sample = Sample([{"role": "user", "content": "a"}])
    conversation = [{"role": "user", "content": "a"}]

    class Lazy:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return sample

    def sizes(sources):
        return [len(source.data) for source in Mixture(sources).sources]

    assert sizes([sample, sample]) == [2]
    assert sizes([conversation, conversation, conversation]) == [3]
    assert sizes([{"messages": conversation}]) == [1]
    assert sizes(Lazy()) == [4]
    assert sizes([Lazy(), [sample, sample]]) == [4, 2]
    assert sizes([Source(Lazy()), Lazy()]) == [4, 4]


def test_paths_are_jsonl_files(write_jsonl):
    path = write_jsonl([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3)
    for sources in (path, str(path), [path], Source(path)):
        mixture = Mixture(sources)
        source, index, item = mixture[2]
        assert (source.name, index, item.line) == (str(path), 2, 3)
        assert source.describe() == {"name": str(path), "rows": 3, "ratio": 1.0, "num": None}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"must be a path or have len\(\) and \[index\], got int"):
        Source(3)
    for ratio in (-1, "1", True, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ratio must be a number from 0"):
            Source([1], ratio)
    for num in (-1, 1.5, True):
        with pytest.raises(ValueError, match="num must be a whole number from 0 or None"):
            Source([1], 1, num)
    with pytest.raises(ValueError, match=r"got none out of list \(0 rows × 1\)"):
        Mixture([])
    with pytest.raises(ValueError, match=r"at least one row per epoch, got none out of a \(3 rows × 0.1\)"):
        Mixture(Source(range(3), 0.1, name="a"))
