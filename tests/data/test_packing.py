"""First-fit decreasing, and which rows leave the window."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvita.data.packing import choose_rows, first_fit_decreasing

LENGTHS = st.lists(st.integers(1, 100), max_size=40)


def test_first_fit_decreasing_by_hand():
    # 7 opens a row, 6 and 5 open more; 4 no longer fits the first (3 left) but the second; 3 the first; 2 the third; 1 the third
    assert first_fit_decreasing([4, 1, 7, 3, 6, 2, 5], 10) == [[2, 3], [4, 0], [6, 5, 1]]
    assert first_fit_decreasing([], 10) == []
    assert first_fit_decreasing([10, 10], 10) == [[0], [1]]


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_that_fit_no_row_are_refused(length):
    with pytest.raises(ValueError, match=f"expected lengths from 1 to the row's 10 tokens, got {length}"):
        first_fit_decreasing([3, length], 10)


@given(lengths=LENGTHS)
def test_every_sample_is_in_one_row_and_no_row_overflows(lengths):
    rows = first_fit_decreasing(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fills = [sum(lengths[i] for i in row) for row in rows]
    assert all(fill <= 100 for fill in fills)
    assert sum(fill <= 50 for fill in fills) <= 1, "two half-empty rows would have shared one"


@given(lengths=LENGTHS, flush=st.booleans(), data=st.data())
def test_rows_leave_or_stay_and_nothing_is_lost(lengths, flush, data):
    ages = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    rows, kept = choose_rows(lengths, ages, 100, flush=flush, patience=4)
    left = [i for row in rows for i in row]
    assert sorted(left + kept) == list(range(len(lengths)))
    assert kept == sorted(kept) and all(row == sorted(row) for row in rows) and rows == sorted(rows)
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    assert rows or not lengths, "every round makes progress"
    assert not kept or not flush
    assert all(ages[i] < 4 for i in kept), "nobody waits longer than patience"


def test_full_rows_leave_and_the_fullest_if_none_is():
    assert choose_rows([99, 60, 30], [0, 0, 0], 100) == ([[0]], [1, 2])
    assert choose_rows([60, 70], [0, 0], 100) == ([[1]], [0])
    assert choose_rows([60, 70], [4, 0], 100) == ([[0]], [1])
    assert choose_rows([60, 60], [0, 0], 100) == ([[0]], [1]), "the older of equals"


def test_large_samples_do_not_lead_every_row():
    rows, _ = choose_rows([10, 90, 50, 50], [0] * 4, 100, flush=True)
    assert rows == [[0, 1], [2, 3]]


def test_packing_is_fast():
    lengths = np.random.default_rng(0).integers(20, 4000, 256).tolist()
    rows = first_fit_decreasing(lengths, 8192)
    assert sum(lengths) / (len(rows) * 8192) > 0.95
