"""Packed rows: every sample once per epoch, full rows, exact resume, and an account of what was dropped."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from longvita.data.loader import PackedLoader
from longvita.data.mixture import Source
from longvita.data.schema import DataError, Sample
from tests.data.support import make_image

BASE = 15  # tokens of a sample but for its question: checked in test_lengths


def sample(number, length):
    """A sample of `length` tokens whose first characters tell its number."""
    text = chr(0x4E00 + number)  # three bytes, three tokens
    return Sample([{"role": "user", "content": text + "z" * (length - BASE - 3)}, {"role": "assistant", "content": "q"}])


class Lazy:
    """Samples made on demand; records who was asked for."""

    def __init__(self, lengths):
        self.lengths, self.asked = lengths, []

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        self.asked.append(index)
        return sample(index, self.lengths[index])


def numbers(loader, batch):
    """Which samples a row holds."""
    found = []
    bounds = batch.sample_cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        text = loader.processor.tokenizer.decode(batch.input_ids[start:end].tolist())
        found.append(ord(text.removeprefix("user\n")[0]) - 0x4E00)
    return found


def same(a, b):
    pairs = [(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__]
    return all(
        (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs
    )


def test_lengths(processor):
    for length in (BASE + 4, 100, 1000):
        assert processor.encode(sample(5, length)).num_tokens == length


# ---- once per epoch ----


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(BASE + 4, 130), min_size=1, max_size=30),
    window=st.integers(1, 12),
    world_size=st.integers(1, 3),
    prefetch=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_every_sample_once_per_epoch_or_counted(processor, lengths, window, world_size, prefetch, seed):
    fits = [i for i, length in enumerate(lengths) if length <= 100]
    per_epoch = {0: [], 1: []}
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "prefetch": prefetch}
        loader = PackedLoader(Lazy(lengths), processor, 100, seed=seed, window=window, epochs=2, **options)
        epoch_of_rank = {0: [], 1: []}
        try:
            for batch in loader:
                assert batch.num_tokens <= 100
                epoch_of_rank[loader.epoch].extend(numbers(loader, batch))
        except DataError as error:
            assert error.reason == "no_samples"  # this rank has no sample, or none that fits
            continue
        for epoch, found in epoch_of_rank.items():
            per_epoch[epoch] += found
        stats = loader.stats
        share = sum(len(loader.mixture.order(epoch)[rank::world_size]) for epoch in (0, 1))
        assert stats.samples + sum(stats.dropped.values()) == share
        assert set(stats.dropped) <= {"too_long"}
    if world_size == 1 and fits:
        assert sorted(per_epoch[0]) == sorted(per_epoch[1]) == fits
    assert len(set(per_epoch[0])) == len(per_epoch[0]) and set(per_epoch[0]) <= set(fits)


def test_ranks_share_an_epoch(processor):
    lengths = [40 + i for i in range(24)]
    found = []
    for rank in range(3):
        loader = PackedLoader(Lazy(lengths), processor, 200, epochs=1, rank=rank, world_size=3)
        mine = [number for batch in loader for number in numbers(loader, batch)]
        assert len(mine) == 8
        found += mine
    assert sorted(found) == list(range(24))


def test_epochs_differ_and_never_end_by_default(processor):
    loader = PackedLoader(Lazy([50] * 12), processor, 100, seed=1)
    stream = iter(loader)
    epochs = [[number for _ in range(6) for number in numbers(loader, next(stream))] for _ in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_iterating_again_goes_on(processor):
    loader = PackedLoader(Lazy([50] * 12), processor, 100, epochs=1)
    first = [numbers(loader, batch) for batch, _ in zip(loader, range(2), strict=False)]
    rest = [numbers(loader, batch) for batch in loader]
    whole = PackedLoader(Lazy([50] * 12), processor, 100, epochs=1)
    everything = [numbers(whole, batch) for batch in whole]
    assert everything[:2] == first[:2] and everything[-len(rest) :] == rest
    assert list(loader) == [] and loader.epoch == 1


# ---- rows ----


def test_rows_are_full_on_a_realistic_mixture(processor):
    """Short captions, middle-sized answers, a few long texts: log-normal lengths of very different scales."""
    rng = np.random.default_rng(0)
    scales = [(60, 0.4, 500), (250, 0.6, 250), (900, 0.7, 60)]
    lengths = (
        np.concatenate([rng.lognormal(np.log(median), sigma, count) for median, sigma, count in scales]).astype(int).clip(BASE + 4, 2048)
    )
    loader = PackedLoader(Lazy(lengths.tolist()), processor, 2048, epochs=1)
    rows = list(loader)
    assert loader.stats.samples == len(lengths) and loader.stats.rows == len(rows)
    assert loader.stats.fill_rate >= 0.97
    assert loader.stats.fill_rate == sum(batch.num_tokens for batch in rows) / (2048 * len(rows))
    assert loader.stats.supervised == 3 * len(lengths)


@pytest.mark.parametrize("reset", [True, False])
def test_documents_and_samples_of_a_row(processor, reset):
    (batch,) = PackedLoader(Lazy([30, 40, 30]), processor, 100, reset=reset, epochs=1)
    batch.validate(processor.config)
    assert batch.num_tokens == 100 and len(batch.sample_cu_seqlens) == 4
    assert len(batch.cu_seqlens) == (4 if reset else 2)
    assert batch.position_ids.max() == (39 if reset else 99)


def test_the_window_is_bounded_in_tokens(processor):
    data = Lazy([100] * 200)
    next(iter(PackedLoader(data, processor, 100, window=200)))
    assert len(data.asked) == 32


def test_long_waiting_samples_leave(processor):
    """A sample that never finds company still leaves within a few rounds."""
    lengths = [60] + [100] * 60
    loader = PackedLoader(Lazy(lengths), processor, 100, window=4, epochs=1, seed=0)
    place = loader.mixture.order(0).tolist().index(0)
    rows = [numbers(loader, batch) for batch in loader]
    assert rows.index([0]) <= place + 4 * 4 + 4


def test_samples_in_the_window_count_the_rounds_they_wait(processor):
    loader = PackedLoader(Lazy([60] * 40), processor, 100, window=6)
    waited = []
    for _ in zip(range(4), loader, strict=False):  # nothing fits beside anything: one leaves a round, until the oldest lose patience
        waited.append([age for _, age in loader.state_dict()["stream"]["window"]])
    assert waited[:4] == [[1] * 5, [2] * 4 + [1], [3] * 3 + [1 + 1, 1], [4] * 2 + [3, 2, 1]]


# ---- resume ----


def state_through_json(loader):
    return json.loads(json.dumps(loader.state_dict()))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(BASE + 4, 120), min_size=6, max_size=25),
    window=st.integers(1, 10),
    stop=st.integers(0, 9),
    reset=st.booleans(),
    prefetch=st.sampled_from([0, 3]),
)
def test_resume_is_exact(processor, lengths, window, stop, reset, prefetch):
    lengths[0] = 50  # one that fits
    sources = [Source(Lazy(lengths), 1.5, name="a"), Source(Lazy([30, 60]), 0.5, name="b")]
    options = {"reset": reset, "window": window, "seed": 2}

    def make(prefetch=0):
        return PackedLoader(sources, processor, 100, **options, prefetch=prefetch)

    whole = make()
    stream = iter(whole)
    expected = [next(stream) for _ in range(stop + 8)]
    first = make(prefetch)
    stream = iter(first)
    head = [next(stream) for _ in range(stop)]
    state = state_through_json(first)
    second = make(prefetch)
    second.load_state_dict(state)
    stream = iter(second)
    tail = [next(stream) for _ in range(8)]
    assert all(same(a, b) for a, b in zip(head + tail, expected, strict=True))
    assert second.state_dict() == whole.state_dict() and second.stats == whole.stats


def test_resume_with_media(processor):
    rng = np.random.default_rng(0)
    videos = [rng.integers(0, 256, (2 + i, 32, 32, 3), dtype=np.uint8) for i in range(6)]
    data = [
        Sample(
            [
                {"role": "user", "content": [{"type": "video", "video": v}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "x"},
            ]
        )
        for v in videos
    ]
    whole = list(PackedLoader(data, processor, 200, epochs=1, window=3))
    loader = PackedLoader(data, processor, 200, epochs=1, window=3)
    stream = iter(loader)
    next(stream)
    other = PackedLoader(data, processor, 200, epochs=1, window=3)
    other.load_state_dict(state_through_json(loader))
    rest = list(other)
    assert len(rest) == len(whole) - 1 and all(same(a, b) for a, b in zip(rest, whole[1:], strict=True))


def test_a_state_is_that_of_the_row_handed_out(processor):
    """Rows prepared ahead do not count as seen."""
    loader, plain = (PackedLoader(Lazy([50] * 20), processor, 100, epochs=1, prefetch=prefetch) for prefetch in (5, 0))
    for _ in zip(loader, plain, strict=True):
        assert loader.state_dict() == plain.state_dict()
        assert loader.stats.rows == plain.stats.rows


def test_a_state_does_not_change_afterwards(processor):
    loader = PackedLoader(Lazy([50] * 20), processor, 100)
    stream = iter(loader)
    next(stream)
    state = loader.state_dict()
    before = json.dumps(state)
    next(stream)
    assert json.dumps(state) == before


@pytest.mark.parametrize(
    "name, change",
    [
        ("seed", {"seed": 1}), ("sequence_length", {"sequence_length": 120}), ("window", {"window": 7}), ("reset", {"reset": False}),
        ("max_frames", {"max_frames": 3}), ("world_size", {"world_size": 2}), ("sources", {"sources": Lazy([50] * 5)}),
    ],
)  # fmt: skip
def test_another_setting_is_not_resumed(processor, name, change):
    options = {"sources": Lazy([50] * 4), "processor": processor, "sequence_length": 100}
    state = PackedLoader(**options).state_dict()
    with pytest.raises(ValueError, match=f"expected the loader's {name} as when the state was saved, .* start a new run"):
        PackedLoader(**{**options, **change}).load_state_dict(state)
    with pytest.raises(ValueError, match=r"expected the state of a PackedLoader \(version 1\), got"):
        PackedLoader(**options).load_state_dict({"step": 3})


# ---- bad samples ----


def test_every_drop_is_counted_by_reason(processor, write_jsonl, tmp_path):
    def row(content, images=()):
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}], "images": list(images)}

    make_image(tmp_path / "good.png", (32, 32))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    rows = [
        row("fine"), b"{", row("<image>"), row("z" * 500), row("<image>", ["nothing.png"]), row("<image>", ["cut.png"]),
        row("<image>", ["good.png"]), row("<image>", ["http://x/y.png"]), b"\xff", row("z" * 600), {"messages": []},
    ]  # fmt: skip
    path = write_jsonl(rows)
    loader = PackedLoader(path, processor, 100, epochs=1, on_error="skip")
    batches = list(loader)
    want = {"json": 1, "placeholder": 1, "too_long": 2, "missing": 1, "truncated": 1, "refused": 1, "utf8": 1, "schema": 1}
    assert dict(loader.stats.dropped) == want
    assert loader.stats.samples == 2 == sum(len(batch.sample_cu_seqlens) - 1 for batch in batches)
    assert loader.stats.by_source == {str(path): 2}


def test_strict_names_the_row_but_long_samples_are_only_counted(processor, write_jsonl):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]}
    path = write_jsonl([good, {"messages": [{"role": "user", "content": "z" * 500}, {"role": "assistant", "content": "x"}]}])
    loader = PackedLoader(path, processor, 100, epochs=1)
    assert len(list(loader)) == 1 and dict(loader.stats.dropped) == {"too_long": 1}
    path = write_jsonl([good, b"{"])
    for prefetch in (0, 2):
        with pytest.raises(DataError, match=f"{path}:2: expected one JSON object per line"):
            list(PackedLoader(path, processor, 100, epochs=1, prefetch=prefetch))


def test_samples_from_memory_are_named_by_their_place(processor):
    bad = Sample([{"role": "user", "content": "a"}])
    with pytest.raises(DataError, match=r"^mine:0: expected the last message to be the assistant's"):
        list(PackedLoader(Source([bad], name="mine"), processor, 100, epochs=1))


def test_an_epoch_without_samples_is_an_error_not_an_endless_loop(processor):
    with pytest.raises(DataError, match="expected rows from epoch 1, got none out of 3 samples; dropped: too_long: 3"):
        next(iter(PackedLoader(Lazy([200] * 3), processor, 100)))


def test_arguments_are_checked(processor):
    data = Lazy([50])
    for options, says in [
        ({"sequence_length": 0}, "sequence_length must be a whole number from 2, got 0"),
        ({"window": 0}, "window must be a whole number from 1, got 0"),
        ({"prefetch": -1}, "prefetch must be a whole number from 0, got -1"),
        ({"world_size": 0}, "world_size must be a whole number from 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must lie in 0 … world_size - 1 = 1, got 2"),
        ({"on_error": "ignore"}, "on_error must be 'strict'"),
    ]:
        with pytest.raises(ValueError, match=says):
            PackedLoader(data, processor, **{"sequence_length": 100, **options})


def test_an_error_in_a_source_is_not_hidden(processor):
    class Faulty(Lazy):
        def __getitem__(self, index):
            raise KeyError("a bug")

    for prefetch in (0, 2):
        with pytest.raises(KeyError, match="a bug"):
            next(iter(PackedLoader(Faulty([50]), processor, 100, on_error="skip", prefetch=prefetch)))
