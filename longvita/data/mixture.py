"""How often every source is read, and in which order.

A source with `ratio` r gives int(rows · r) rows per epoch, at most `num`. It deals them from an endless sequence of its own shuffles:
no row comes a second time before every other came once: with ratio 1 each epoch has every row exactly once, with 0.1 ten epochs have.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longvita.data.schema import JsonlSource


@dataclass(frozen=True, eq=False)
class Source:
    """One source of a mixture.

    data   a JSONL file's path, or anything with len() and [i] → Sample, row or list of messages (the same for the same i)
    ratio  scales its rows per epoch (below 1: a part; above 1: repeats)
    num    caps its rows per epoch
    name   for messages and statistics
    """

    data: Any
    ratio: float = 1.0
    num: int | None = None
    name: str | None = None

    def __post_init__(self):
        data = JsonlSource(self.data) if isinstance(self.data, str | os.PathLike) else self.data
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(f"a source must be a path or have len() and [index], got {type(data).__name__}; put the samples into a list")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 <= self.ratio < float("inf"):
            raise ValueError(f"ratio must be a number from 0, got {self.ratio!r}")
        if self.num is not None and (isinstance(self.num, bool) or not isinstance(self.num, int) or self.num < 0):
            raise ValueError(f"num must be a whole number from 0 or None, got {self.num!r}")
        object.__setattr__(self, "data", data)
        if self.name is None:
            object.__setattr__(self, "name", getattr(data, "path", type(data).__name__))

    @property
    def rows_per_epoch(self) -> int:
        rows = int(len(self.data) * self.ratio + 1e-9)  # 0.1 · 30 is 3, not 2
        return rows if self.num is None else min(rows, self.num)

    def describe(self) -> dict:
        """For records: what it is called and how much of it is read."""
        return {"name": self.name, "rows": len(self.data), "ratio": self.ratio, "num": self.num}

    def fingerprint(self) -> dict:
        """What must not change between saving and resuming: its rows, wherever they lie."""
        return {"rows": len(self.data), "ratio": self.ratio, "num": self.num, "checksum": getattr(self.data, "checksum", None)}


class Mixture:
    """Several sources as one shuffled list per epoch, the same for the same (seed, epoch).

    sources: one source or a list of them. A source is a Source, a path, or an object with len() and [index], such as a list of samples.
    """

    def __init__(self, sources, seed: int = 0):
        several = isinstance(sources, list | tuple) and len(sources) > 0 and all(_is_source(item) for item in sources)
        self.sources = [item if isinstance(item, Source) else Source(item) for item in (sources if several else [sources])]
        self.seed = seed
        self._starts = np.cumsum([0] + [len(source.data) for source in self.sources])
        if not self.rows_per_epoch:
            got = ", ".join(f"{source.name} ({len(source.data)} rows × {source.ratio:g})" for source in self.sources)
            raise ValueError(f"expected at least one row per epoch, got none out of {got}; check paths, ratio and num")

    @property
    def rows_per_epoch(self) -> int:
        return sum(source.rows_per_epoch for source in self.sources)

    def order(self, epoch: int) -> np.ndarray:
        """(rows per epoch,) int64: row numbers over all sources laid end to end, shuffled."""
        dealt = [self._deal(number, source, epoch) for number, source in enumerate(self.sources)]
        rows = np.concatenate(dealt)
        return rows[_permutation(len(rows), self.seed, epoch)]

    def __getitem__(self, row: int):
        """(source, index within it, its item) of a row number."""
        number = self._number(row)
        source, index = self.sources[number], int(row - self._starts[number])
        return source, index, source.data[index]

    def source_of(self, row: int) -> Source:
        return self.sources[self._number(row)]

    def _number(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _deal(self, number: int, source: Source, epoch: int) -> np.ndarray:
        count, size = source.rows_per_epoch, len(source.data)
        if not count:
            return np.empty(0, dtype=np.int64)
        first, last = epoch * count, (epoch + 1) * count  # in the endless sequence of shuffles
        shuffles = [_permutation(size, self.seed, number, k) for k in range(first // size, (last - 1) // size + 1)]
        start = first - first // size * size
        return np.concatenate(shuffles)[start : start + count] + self._starts[number]


def _is_source(item) -> bool:
    """Told from a conversation, which is a sample of a source: a list of messages."""
    if isinstance(item, list | tuple):
        return len(item) > 0 and not (isinstance(item[0], Mapping) and "role" in item[0])
    return isinstance(item, Source | str | os.PathLike) or (
        hasattr(item, "__len__") and hasattr(item, "__getitem__") and not isinstance(item, Mapping)
    )


def _permutation(size: int, *seed: int) -> np.ndarray:
    """A shuffle that stays the same with every version of numpy: only the raw bits of PCG64 are promised to."""
    bits = np.random.PCG64(np.random.SeedSequence([len(seed), *seed])).random_raw(size)
    return np.argsort(bits, kind="stable")
