"""Choosing tokens and cutting text into pieces."""

import pytest
import torch

from longvita.data.template import ChatTokenizer
from longvita.infer.sampling import Sampler, SamplingParams, TextStream, check_stop


def draw(params, logits, prompts=None, times=1, first_index=0):
    """`times` successive draws of every row."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    prompts = prompts or [[0]] * len(logits)
    sampler = Sampler(params, [torch.tensor(p) for p in prompts], logits.shape[1], first_index)
    return [sampler(logits, range(len(logits))) for _ in range(times)]


def test_greedy_takes_the_largest():
    assert draw(SamplingParams(), [[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]]) == [[1, 0]]


def test_frequencies_follow_temperature():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    for temperature in (1.0, 0.5):
        drawn = torch.tensor(draw(SamplingParams(temperature=temperature, seed=1), probabilities.log()[None], times=4000)).flatten()
        expected = probabilities ** (1 / temperature)
        torch.testing.assert_close(drawn.bincount(minlength=3) / 4000, expected / expected.sum(), rtol=0, atol=0.03)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([[0.4, 0.05, 0.3, 0.25]]).log()

    def kept(**options):
        return {row[0] for row in draw(SamplingParams(temperature=1.0, seed=2, **options), logits, times=400)}

    assert kept() == {0, 1, 2, 3} and kept(top_k=9) == {0, 1, 2, 3}
    assert kept(top_k=2) == {0, 2} and kept(top_k=1) == {0}
    assert kept(top_p=0.39) == {0} and kept(top_p=0.6) == {0, 2} and kept(top_p=0.9) == {0, 2, 3}
    assert kept(top_p=0.6, top_k=1) == {0}


def test_repetition_penalty_counts_prompt_and_answer():
    params = SamplingParams(repetition_penalty=2.0)
    # Row 0 has seen token 0 (3 → 1.5), so it takes 1 (2 → 1 afterwards), then 0 again, for ever. Row 1's negative seen logit doubles.
    assert draw(params, [[3.0, 2.0, 0.5], [-1.0, -1.5, -9.0]], prompts=[[0], [0]], times=3) == [[1, 1], [0, 0], [0, 0]]


def test_seed_decides_whatever_runs_beside():
    logits = torch.zeros(3, 50)
    params = SamplingParams(temperature=1.0, seed=11)
    together = draw(params, logits, times=8)
    assert together == draw(params, logits, times=8)
    assert together != draw(SamplingParams(temperature=1.0, seed=12), logits, times=8)
    alone = draw(params, logits[:1], times=8, first_index=2)
    assert [row[2] for row in together] == [row[0] for row in alone]
    assert [row[0] for row in together] != [row[1] for row in together]
    free = SamplingParams(temperature=1.0)
    assert draw(free, logits, times=8) != draw(free, logits, times=8)


def test_extreme_logits_are_fine_and_broken_ones_are_not():
    assert draw(SamplingParams(temperature=1e-6, seed=0), [[1e4, -1e4, 0.0]]) == [[0]]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match="logits that are not finite"):
            draw(SamplingParams(), [[0.0, bad]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k must be a whole number, 0 for all tokens, got -1"),
        ({"top_k": 2.0}, "top_k must be a whole number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_errors_teach(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


# ---- text ----


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer.train_bpe(["plain words, plain text"], 276)  # bytes only: every character of several bytes is cut


def stream(tokenizer, text, stop=()):
    out = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(out.push(token))
        if out.stopped:
            break
    return [*pieces, out.finish()], out.stopped


def test_pieces_are_whole_characters(tokenizer):
    text = "né 漢字 🙂!"
    pieces, stopped = stream(tokenizer, text)
    assert "".join(pieces) == text and not stopped
    assert len(pieces) == len(text.encode()) + 1 and all(len(piece) <= 1 for piece in pieces)
    cut = TextStream(tokenizer)
    assert [cut.push(token) for token in tokenizer.encode("🙂")[:2]] == ["", ""] and cut.finish() == "\ufffd"


def test_a_stop_string_is_never_shown_in_part(tokenizer):
    for text, stop, shown in (
        ("one STOP two", "STOP", "one "),
        ("one STSTOP two", ["STOP"], "one ST"),
        ("a\n\nb", ["\n\n", "b"], "a"),
        ("xaab", ["aab", "zz"], "x"),
        ("STOP", ["STOP"], ""),
        ("naïve é", ["é"], "naïve "),
    ):
        pieces, stopped = stream(tokenizer, text, stop)
        assert stopped and "".join(pieces) == shown
        assert all(shown.startswith("".join(pieces[: i + 1])) for i in range(len(pieces)))


def test_what_only_looked_like_a_stop_string_comes_out_at_the_end(tokenizer):
    pieces, stopped = stream(tokenizer, "one STO", ["STOP"])
    assert "".join(pieces) == "one STO" and not stopped and pieces[-1] == "STO"
    pieces, _ = stream(tokenizer, "one STO...", ["STOP"])
    assert "".join(pieces[:8]) == "one STO."


def test_stop_strings_are_checked():
    assert check_stop("end") == ("end",) and check_stop(["a", "b"]) == ("a", "b")
    for bad in ([""], [3], ""):
        with pytest.raises(ValueError, match="stop must hold non-empty strings"):
            check_stop(bad)
