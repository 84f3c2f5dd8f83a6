"""Needles lie where they should, in as many tokens as were asked for, and held-out material is held out."""

import functools
import re

import numpy as np
import pytest

from longvita.data.processor import Processor
from longvita.demo.material import make_config, make_tokenizer
from longvita.eval import haystack
from longvita.eval.haystack import TextHay, VideoHay


@functools.cache
def processor():
    tokenizer = make_tokenizer()
    return Processor(make_config(tokenizer), tokenizer)


@functools.cache
def hay():
    return TextHay(haystack.load_prose()[1], processor().tokenizer)


def test_splits_share_nothing():
    train, held_out = haystack.load_digits()
    assert len(train) + len(held_out) == 1797 and len(held_out) == 360
    # scikit-learn's set has 1,797 different scans, so equal pictures would be the same scan
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in held_out.images}
    prose, other = haystack.load_prose()
    sentences = set(prose.split(". "))
    assert len(other) > 30_000  # characters: twice what the longest question needs
    assert not [s for s in other.split(". ")[1:-1] if len(s) > 40 and s in sentences]


def test_the_mark_is_a_border_and_leaves_the_original():
    frame = np.full((32, 32, 3), 200, np.uint8)
    marked = haystack.mark(frame)
    assert (frame == 200).all()
    assert (marked[4:-4, 4:-4] == 200).all()
    assert (marked[:4] == haystack.MARK_RGB).all() and (marked[:, -4:] == haystack.MARK_RGB).all()


@pytest.mark.parametrize("depth, place", [(0.0, 0), (0.5, 10), (1.0, 20)])
def test_the_marked_frame_lies_at_its_depth(depth, place):
    frames, digit = VideoHay(haystack.load_digits()[0]).frames(21, np.random.default_rng(0), depth=depth)
    marked = [i for i, frame in enumerate(frames) if tuple(frame[0, 0]) == haystack.MARK_RGB]
    assert marked == [place]
    plain, same = VideoHay(haystack.load_digits()[0]).frames(21, np.random.default_rng(0), depth=depth, needle=False)
    assert same == digit and not any(tuple(frame[0, 0]) == haystack.MARK_RGB for frame in plain)
    others = [i for i in range(21) if i != place]
    assert (plain[others] == frames[others]).all(), "the same question"


def test_without_the_needle_no_frame_tells_the_digit():
    """Whoever answers with the digit that is shown most is right by chance: in 126 of 900 videos or more once in 10,000 times."""
    digits, rng = haystack.load_digits()[0], np.random.default_rng(0)
    label = {image.tobytes(): digit for image, digit in zip(digits.images, digits.labels.tolist(), strict=True)}
    guessed = 0
    for _ in range(900):
        frames, digit = VideoHay(digits).frames(5, rng, depth=0.5, needle=False)
        shown = [label[frame.tobytes()] for frame in frames]
        guessed += max(set(shown), key=shown.count) == digit
    assert guessed < 126


@pytest.mark.parametrize("tokens", [200, 1024, 5000])
def test_a_text_has_as_many_tokens_as_asked(tokens):
    needle = haystack.text_needle(hay(), processor(), tokens, np.random.default_rng(tokens), depth=0.5, facts=3, ask=2)
    count = processor().encode(needle.sample).num_tokens
    assert tokens - 12 <= count <= tokens  # a word that would not fit is left out


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.75, 1.0])
def test_a_fact_lies_at_its_depth(depth):
    needle = haystack.text_needle(hay(), processor(), 4096, np.random.default_rng(1), depth=depth)
    body, _, question = needle.sample.messages[0]["content"].rpartition("\n")
    fact = re.search(r"Remember the code ([A-Z][a-z]+)(\d)\.", body)
    assert abs(fact.start() / len(body) - depth) < 0.06
    assert fact[1] + fact[2] == needle.answer and fact[1] in question and fact[1] in haystack.NAMES


def test_the_needle_can_be_removed():
    with_fact, without = (
        haystack.text_needle(hay(), processor(), 1024, np.random.default_rng(3), depth=0.5, needle=needle) for needle in (True, False)
    )
    assert "Remember the code" in with_fact.sample.messages[0]["content"]
    assert "Remember the code" not in without.sample.messages[0]["content"]
    assert with_fact.answer == without.answer
    assert with_fact.sample.messages[0]["content"].rpartition("\n")[2] == without.sample.messages[0]["content"].rpartition("\n")[2]


def test_several_facts_are_all_told_and_asked():
    needle = haystack.text_needle(hay(), processor(), 2048, np.random.default_rng(4), facts=8, ask=5)
    messages = needle.sample.messages
    assert len(messages) == 10
    told = dict(re.findall(r"Remember the code ([A-Z][a-z]+)(\d)\.", messages[0]["content"]))
    assert len(told) == 8
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        name, digit = re.search(r"([A-Z][a-z]+)(\d)\.", answer["content"]).groups()
        assert told[name] == digit and name in question["content"]


def test_video_frames_fill_the_tokens(tmp_path):
    count = haystack.video_frames(processor(), 1024)
    frames, digit = VideoHay(haystack.load_digits()[1]).frames(count, np.random.default_rng(0))
    path = tmp_path / "a.mp4"
    haystack.write_video(path, frames)
    encoded = processor().encode(haystack.Sample(haystack.video_turns(path, digit), placeholders=False)).loaded()
    assert 1024 - processor().layout.tokens_per_frame < encoded.num_tokens <= 1024
    assert encoded.tiles.shape == (count, 32, 32, 3)
    assert np.abs(encoded.tiles.astype(int) - frames).mean() < 6  # what compression costs


def test_spelled_questions():
    rng = np.random.default_rng(0)
    sample = haystack.spelled_video(5, rng)
    words = sample.messages[0]["content"].split("\n")[0].split()
    assert words.count("marked") == 1
    assert haystack.WORDS[int(sample.messages[1]["content"])] == words[words.index("marked") + 1]
    sample = haystack.spelled_images(3, rng)
    words = sample.messages[0]["content"].split("\n")[0].split()
    assert sample.messages[1]["content"].split() == [str(haystack.WORDS.index(word)) for word in words]


def test_too_little_room_is_an_error_that_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"expected at least \d+ tokens for 1 codes and 1 questions, got 20"):
        haystack.text_needle(hay(), processor(), 20, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"expected a passage of at most \d+ tokens"):
        haystack.text_needle(hay(), processor(), 10_000_000, np.random.default_rng(0))
    with pytest.raises(ValueError, match="expected room for at least one frame of 18 tokens, got 30 in all"):
        haystack.video_frames(processor(), 30)
