"""The grid counts what it should: an oracle scores 1, a parrot 0, and every cell has its questions."""

import re

import pytest

from longvita.demo.material import make_config, make_tokenizer
from longvita.eval import needle
from longvita.eval.haystack import TEXT_ANSWER
from longvita.model.long_vita import LongVita


@pytest.fixture(scope="module")
def model():
    return LongVita(make_config(make_tokenizer())).init_weights(0).eval()


@pytest.fixture(scope="module")
def processor(model):
    from longvita.data.processor import Processor

    return Processor(model.config, make_tokenizer())


@pytest.mark.parametrize(
    "answer, expected, right",
    [
        ("7", "7", True),
        (" 7.", "7", True),
        ("", "7", False),
        ("77", "7", False),
        ("7 3", "7", False),
        ("seven", "7", False),
        ("Oslo7", "7", False),
        ("The code is Oslo7.", "Oslo7", True),
        ("The code is Oslo3.", "Oslo7", False),
        ("The code is Rome7.", "Oslo7", False),
        ("The code is 7.", "Oslo7", False),
        ("The code is Oslo.", "Oslo7", False),
        ("Oslo7, Rome3", "Oslo7", False),
        ("", "Oslo7", False),
    ],
)
def test_only_the_one_right_number_counts_and_in_a_text_behind_the_right_name(answer, expected, right):
    assert needle.score(answer, expected) is right


def test_shares_have_wilson_s_intervals():
    """Against values printed in textbooks (Newcombe, 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29)."""
    printed = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for right, questions, low, high in printed:
        found = needle.share(right, questions)
        assert found["accuracy"] == right / questions and found["questions"] == questions
        assert found["interval"] == pytest.approx([low, high], abs=1e-4)
    assert needle.share(20, 20)["interval"] == pytest.approx([1 - 0.1611, 1.0], abs=1e-4)


def test_an_oracle_scores_one_and_reads_the_fact_where_it_lies(model, processor, monkeypatch):
    def oracle(_, prompts, *, max_new_tokens, tokens_at_once):
        answers = []
        for batch in prompts:
            text = processor.tokenizer.decode(batch.input_ids.tolist())
            name, digit = re.search(r"Remember the code ([A-Z][a-z]+)(\d)\.", text).groups()
            answers.append(processor.tokenizer.encode(TEXT_ANSWER.format(name=name, digit=digit)))
            assert len(answers[-1]) <= max_new_tokens
        return answers

    monkeypatch.setattr(needle, "generate_ids", oracle)
    grid = needle.needle_grid(model, processor, "text", lengths=[512, 256], depths=(1.0, 0.0), questions=(3, 2))
    assert grid == {
        "lengths": [256, 512], "depths": [0.0, 1.0], "accuracy": [[1.0, 1.0], [1.0, 1.0]], "questions": 10, "mean": 1.0,
        "by_length": [needle.share(4, 4), needle.share(6, 6)],
    }  # fmt: skip


def test_depths_are_counted_apart(model, processor, monkeypatch):
    """A model that is right for the first three of six questions has 1.0 at the first depth and 0.0 at the second."""
    truths = []
    questions = needle._questions

    def watched(*args):
        for question in questions(*args):
            truths.append(int(question.answer))
            yield question

    def half(_, prompts, **__):
        count = len(list(prompts))
        return [processor.tokenizer.encode(str(truths[i] if i < 3 else (truths[i] + 1) % 10)) for i in range(count)]

    monkeypatch.setattr(needle, "_questions", watched)
    monkeypatch.setattr(needle, "generate_ids", half)
    assert needle.needle_grid(model, processor, "video", lengths=[128], depths=(0.2, 0.9), questions=3)["accuracy"] == [[1.0, 0.0]]


@pytest.mark.parametrize("kind", needle.KINDS)
def test_a_real_model_is_asked(model, processor, kind):
    said = []
    grid = needle.needle_grid(model, processor, kind, lengths=[200], depths=(0.5,), questions=2, progress=said.append)
    assert grid["questions"] == 2 and 0 <= grid["mean"] <= 1
    assert re.fullmatch(rf"{kind} needle at 200 tokens: \d\.\d\d of 2 questions right", said[0])


def test_unknown_kind(model, processor):
    with pytest.raises(ValueError, match="expected one of video, text as the kind of needle, got 'audio'"):
        needle.needle_grid(model, processor, "audio", lengths=[200])
