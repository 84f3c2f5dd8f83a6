"""An endless, resumable stream of packed rows.

loader = PackedLoader([Source("captions.jsonl", ratio=0.1), Source("talks.jsonl")], processor, 8192, reset=True, seed=0)
for batch in loader: …
state = loader.state_dict()                  # plain JSON; in the loop it stands right after the batch just handed out
loader.load_state_dict(state)                # the next row is the one that would have come, bit for bit
"""

import copy
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from longvita.data.mixture import Mixture
from longvita.data.packing import choose_rows
from longvita.data.processor import EncodedSample, Processor, collate
from longvita.data.schema import DataError, as_sample, check_policy
from longvita.model.batch import Batch

WINDOW_ROWS = 32  # a window holds at most this many rows' worth of tokens, whatever its samples


@dataclass
class LoaderStats:
    """What came through so far, over all epochs.

    dropped  reason → samples; samples + dropped (+ those still waiting) = rows read from the sources
    """

    sequence_length: int
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    dropped: Counter = field(default_factory=Counter)
    by_source: Counter = field(default_factory=Counter)

    @property
    def fill_rate(self) -> float:
        """Share of the rows' tokens in use, 0 to 1."""
        return self.tokens / (self.rows * self.sequence_length) if self.rows else 0.0

    def as_dict(self) -> dict:
        return {
            "rows": self.rows, "samples": self.samples, "tokens": self.tokens, "supervised": self.supervised,
            "dropped": dict(self.dropped), "by_source": dict(self.by_source),
        }  # fmt: skip


class PackedLoader:
    """Iterates over packed rows (Batch) of at most `sequence_length` tokens.

    sources          one source or a list of them: Source, path of a JSONL file, or any object with len() and [i]
    reset            True: a sample is an attention document of its own, positions from 0. False: the row is one document
    window           samples that are looked at together when packing
    max_frames       of a video
    epochs           None: endless. Every epoch's last rows are handed out however full they are, so that each has exactly its samples
    on_error         "strict": a bad row or medium raises DataError. "skip": it is counted in stats.dropped, as too long samples always are
    rank, world_size this process's share of the data: every world_size-th sample
    prefetch         rows prepared ahead in a thread; the stream is the same

    Iterating again goes on where the last iteration stopped.
    """

    def __init__(
        self,
        sources,
        processor: Processor,
        sequence_length: int,
        *,
        reset: bool = True,
        seed: int = 0,
        window: int = 256,
        max_frames: int | None = None,
        epochs: int | None = None,
        on_error: str = "strict",
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 0,
    ):
        check_policy(on_error)
        _check_whole("sequence_length", sequence_length, 2)
        _check_whole("window", window, 1)
        _check_whole("world_size", world_size, 1)
        _check_whole("prefetch", prefetch, 0)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 … world_size - 1 = {world_size - 1}, got {rank}")
        self.mixture = sources if isinstance(sources, Mixture) else Mixture(sources, seed)
        self.processor, self.sequence_length, self.reset = processor, sequence_length, reset
        self.window, self.max_frames = window, max_frames
        self.epochs, self.on_error, self.rank, self.world_size, self.prefetch = epochs, on_error, rank, world_size, prefetch
        self._fingerprint = self._describe()
        self._state = _Stream(self, None).snapshot()

    def __iter__(self) -> Iterator[Batch]:
        stream = _Stream(self, self._state)
        rows = _prefetched(stream.rows(), self.prefetch) if self.prefetch else stream.rows()
        for batch, self._state in rows:
            if batch is not None:  # the end of an epoch moves the state alone
                yield batch

    @property
    def stats(self) -> LoaderStats:
        """As of the row handed out last."""
        return _stats_from(self.sequence_length, self._state["stats"])

    @property
    def epoch(self) -> int:
        return self._state["epoch"]

    # ---- resuming ----

    def state_dict(self) -> dict:
        """Where the stream stands, as plain JSON; later rows do not change it. Cheap at every step: what is inside is shared, read only."""
        return {"version": 1, "stream": dict(self._state), "fingerprint": dict(self._fingerprint)}

    def load_state_dict(self, state: dict) -> None:
        """Goes back to a saved place. ValueError if sources or settings differ from those of the saving loader."""
        if not isinstance(state, dict) or state.get("version") != 1:
            raise ValueError(f"expected the state of a PackedLoader (version 1), got {str(state)[:80]}; take it from state_dict()")
        saved = state["fingerprint"]
        for key, value in self._fingerprint.items():
            if saved.get(key) != value:
                raise ValueError(
                    f"expected the loader's {key} as when the state was saved, {saved.get(key)!r}, got {value!r}; "
                    "the data would not go on where it stopped: restore the setting or start a new run"
                )
        self._state = copy.deepcopy(state["stream"])

    def _describe(self) -> dict:
        """What the stream depends on. Not on_error: a run that a bad row stopped may go on with "skip"."""
        return {
            "sources": [source.fingerprint() for source in self.mixture.sources],
            "processor": self.processor.fingerprint(),
            "seed": self.mixture.seed,
            "sequence_length": self.sequence_length,
            "reset": self.reset,
            "window": self.window,
            "max_frames": self.max_frames,
            "rank": self.rank,
            "world_size": self.world_size,
        }


@dataclass
class _Waiting:
    """A sample in the window: its place in the epoch's order and the rounds it has waited."""

    place: int
    encoded: EncodedSample
    age: int = 0


class _Stream:
    """The producing side of a loader: everything that moves, and a snapshot of it for every row."""

    def __init__(self, loader: PackedLoader, state: dict | None):
        self.loader = loader
        self.epoch = state["epoch"] if state else 0
        self.cursor = state["cursor"] if state else 0  # next place to read
        self.stats = _stats_from(loader.sequence_length, state["stats"] if state else {})
        self._restore = state  # waiting samples are encoded again when the first row is asked for
        self.window: list[_Waiting] = []
        self.ready: deque[list[_Waiting]] = deque()
        self.epoch_start = state["epoch_start"] if state else 0  # stats.rows when this epoch began

    def snapshot(self) -> dict:
        return {
            "epoch": self.epoch, "cursor": self.cursor, "epoch_start": self.epoch_start, "window": [[w.place, w.age] for w in self.window],
            "ready": [[w.place for w in row] for row in self.ready], "stats": self.stats.as_dict(),
        }  # fmt: skip

    def rows(self) -> Iterator[tuple[Batch | None, dict]]:
        loader = self.loader
        while loader.epochs is None or self.epoch < loader.epochs:
            self.order = loader.mixture.order(self.epoch)[loader.rank :: loader.world_size]
            self._resume()
            while True:
                while self.ready:
                    batch = self._assemble(self.ready.popleft())
                    if batch is not None:
                        yield batch, self.snapshot()
                self._fill()
                if not self.window:
                    break
                self._pack(flush=self.cursor == len(self.order))
            if self.stats.rows == self.epoch_start:
                counts = ", ".join(f"{reason}: {count}" for reason, count in self.stats.dropped.items())
                raise DataError(
                    "no_samples",
                    f"expected rows from epoch {self.epoch + 1}, got none out of {len(self.order)} samples; dropped: {counts or 'none'}",
                )
            self.epoch, self.cursor, self.epoch_start = self.epoch + 1, 0, self.stats.rows
            yield None, self.snapshot()

    def _resume(self) -> None:
        state, self._restore = self._restore, None
        if state is None:
            return
        encode = self._encode
        self.window = [w for w in (encode(place, age) for place, age in state["window"]) if w is not None]
        self.ready = deque([w for w in (encode(place) for place in row) if w is not None] for row in state["ready"])

    def _fill(self) -> None:
        """Reads until the window is full of samples or of tokens."""
        tokens = sum(w.encoded.num_tokens for w in self.window)
        while (
            len(self.window) < self.loader.window and tokens < WINDOW_ROWS * self.loader.sequence_length and self.cursor < len(self.order)
        ):
            waiting = self._encode(self.cursor)
            self.cursor += 1
            if waiting is not None:
                self.window.append(waiting)
                tokens += waiting.encoded.num_tokens

    def _pack(self, flush: bool) -> None:
        lengths, ages = [w.encoded.num_tokens for w in self.window], [w.age for w in self.window]
        rows, kept = choose_rows(lengths, ages, self.loader.sequence_length, flush=flush)
        self.ready.extend([self.window[i] for i in row] for row in rows)
        self.window = [_Waiting(self.window[i].place, self.window[i].encoded, self.window[i].age + 1) for i in kept]

    def _encode(self, place: int, age: int = 0) -> _Waiting | None:
        loader = self.loader
        try:
            source, index, item = loader.mixture[self.order[place]]
            sample = as_sample(item, source.name, index)
            if not sample.source:
                sample = replace(sample, source=source.name, line=index)
            encoded = loader.processor.encode(sample, training=True, max_tokens=loader.sequence_length, max_frames=loader.max_frames)
        except DataError as error:
            self._drop(error)
            return None
        return _Waiting(place, encoded, age)

    def _assemble(self, row: list[_Waiting]) -> Batch | None:
        """Decodes the row's media and joins its samples; a medium that breaks now costs its sample, not the row."""
        whole = []
        for waiting in row:
            try:
                whole.append((waiting, waiting.encoded.loaded()))
            except DataError as error:
                self._drop(error)
        if not whole:
            return None
        batch = collate([encoded for _, encoded in whole], reset=self.loader.reset)
        self.stats.rows += 1
        self.stats.samples += len(whole)
        self.stats.tokens += batch.num_tokens
        self.stats.supervised += int((batch.labels >= 0).sum())
        self.stats.by_source.update(self.loader.mixture.source_of(self.order[waiting.place]).name for waiting, _ in whole)
        return batch

    def _drop(self, error: DataError) -> None:
        if self.loader.on_error == "strict" and error.reason != "too_long":
            raise error
        self.stats.dropped[error.reason] += 1


def _check_whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")


def _stats_from(sequence_length: int, saved: dict) -> LoaderStats:
    counters = {key: Counter(saved.get(key, {})) for key in ("dropped", "by_source")}
    return LoaderStats(sequence_length, **{**saved, **counters})


def _prefetched(rows: Iterator, ahead: int) -> Iterator:
    """The same items, prepared by one thread up to `ahead` early. Errors arrive where their item would have."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="longvita-data")
    try:
        pending = deque(pool.submit(next, rows, None) for _ in range(ahead))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, rows, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
