"""Which samples share a row: first-fit decreasing over a window of samples that look ahead.

The longest sample opens the first row; every next one goes into the first row with room for it. Rows that came out full leave; the samples
of the others wait for better company, but never more than `patience` rounds.
"""

from collections.abc import Sequence

FULL = 0.98  # a row this full leaves at once
PATIENCE = 4  # rounds a sample waits at most


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of positions into `lengths`; each row's lengths sum to at most `capacity`. ValueError for a length that fits no row."""
    rows, room = [], []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        if not 0 < length <= capacity:
            raise ValueError(f"expected lengths from 1 to the row's {capacity} tokens, got {length}; drop the sample before packing")
        for row, left in enumerate(room):
            if length <= left:
                rows[row].append(position)
                room[row] -= length
                break
        else:
            rows.append([position])
            room.append(capacity - length)
    return rows


def choose_rows(
    lengths: Sequence[int], ages: Sequence[int], capacity: int, *, flush: bool = False, full: float = FULL, patience: int = PATIENCE
) -> tuple[list[list[int]], list[int]]:
    """(rows that leave now, positions that stay), both in the order of arrival.

    ages: the rounds every sample has waited. A row leaves if it is `full`, if a sample in it has waited `patience` rounds, or on `flush`;
    if none does, the fullest leaves, so that every round makes progress.
    """
    rows = [sorted(row) for row in first_fit_decreasing(lengths, capacity)]
    leaving = [row for row in rows if flush or sum(lengths[i] for i in row) >= full * capacity or any(ages[i] >= patience for i in row)]
    if not leaving and rows:
        leaving = [max(rows, key=lambda row: (sum(lengths[i] for i in row), -row[0]))]
    gone = {i for row in leaving for i in row}
    return sorted(leaving), [i for i in range(len(lengths)) if i not in gone]
