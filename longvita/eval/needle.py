"""The needle in a haystack: does the model find one marked frame in a long video, one code (a name and a digit) in a long text?

    result = evaluate_run("demo-out/stage4", kinds=("video", "text"), lengths=[1024, 8192], questions=200)
    result["video"]["accuracy"][i][j]      # at lengths[i] (tokens of the whole conversation) and depths[j] (0 the start, 1 the end)

The answer is a digit (of a video) or a whole code, name and digit (of a text: "Tunis8"). It counts if its only word with a digit is the
expected one. The digit is drawn uniformly and the question gives the name, so chance is 0.1 for both. Shares come with their 95 % Wilson
intervals.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from longvita.data.schema import Sample
from longvita.eval import haystack
from longvita.infer.engine import generate_ids
from longvita.model.loading import load

KINDS = ("video", "text")
CHANCE = 0.1  # of ten digits
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKENS_AT_ONCE = 32768
ANSWER_TOKENS = {"video": 4, "text": 12}


def evaluate_run(
    run_dir: str | os.PathLike, *, kinds: Sequence[str] = KINDS, lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None, questions: int = 200, seed: int = 0, progress: Callable[[str], None] | None = None,
    each_question: Callable[[], None] | None = None,
) -> dict:  # fmt: skip
    """{kind: what `needle_grid` returns} of the newest checkpoint in a run directory.

    lengths    tokens of the whole conversation; default: an eighth, a quarter, half and all of what the run was trained with
    questions  per kind, spread evenly over the grid (at least one a cell)
    """
    model, processor = load(run_dir)
    lengths = list(lengths or default_lengths(run_dir))
    depths = list(DEPTHS if depths is None else depths)
    return {
        kind: needle_grid(
            model, processor, kind, lengths=lengths, depths=depths, questions=max(1, questions // (len(lengths) * len(depths))), seed=seed,
            progress=progress, each_question=each_question,
        )
        for kind in kinds
    }  # fmt: skip


def default_lengths(run_dir: str | os.PathLike) -> list[int]:
    """An eighth, a quarter, half and all of the sequence length in a run directory's config.json."""
    from longvita.model.checkpoint_io import read_json

    recipe = read_json(os.path.join(run_dir, "config.json")).get("recipe")
    if not recipe:
        raise ValueError(f"{run_dir} does not say how long its training sequences were: name the lengths (--lengths 1K,2K)")
    return [recipe["sequence_length"] // part for part in (8, 4, 2, 1)]


def needle_grid(
    model, processor, kind: str, *, lengths: Sequence[int], depths: Sequence[float] = DEPTHS, questions: int | Sequence[int] = 10,
    seed: int = 0, needle: bool = True, progress: Callable[[str], None] | None = None, each_question: Callable[[], None] | None = None,
) -> dict:  # fmt: skip
    """Asks `questions` questions (one number, or one for each length) in every cell of lengths × depths, about fresh held-out material.

    needle=False asks the same questions with another, unmarked frame in place of the marked one, and with the code left out: the score must
    then be at chance. each_question() is called before every question, on this thread.
    Returns {"lengths", "depths", "accuracy" (a row per length), "by_length" (a `share` per length), "questions" (in all), "mean" (the
    share of all questions that are answered rightly)}.
    """
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)} as the kind of needle, got {kind!r}")
    counts = [questions] * len(lengths) if isinstance(questions, int) else list(questions)
    if len(counts) != len(lengths):
        raise ValueError(f"expected one number of questions, or one for each of {len(lengths)} lengths; got {len(counts)}")
    asked, depths = sorted(zip(lengths, counts, strict=True)), sorted(depths)
    accuracy, by_length, answered = [], [], []
    for length, count in asked:
        right = _ask(model, processor, kind, length, [depth for depth in depths for _ in range(count)], seed, needle, each_question)
        accuracy.append(np.reshape(right, (len(depths), count)).mean(axis=1).tolist())
        by_length.append(share(sum(right), len(right)))
        answered += right
        if progress is not None:
            progress(f"{kind} needle at {length} tokens: {np.mean(right):.2f} of {len(right)} questions right")
    return {
        "lengths": [length for length, _ in asked], "depths": depths, "accuracy": accuracy, "by_length": by_length,
        "questions": len(answered), "mean": float(np.mean(answered)),
    }  # fmt: skip


def _ask(model, processor, kind, length, cells, seed, needle, each_question) -> list[bool]:
    """Which of the questions, one for each depth in `cells`, are answered rightly."""
    rng = np.random.default_rng([seed, KINDS.index(kind), length])
    with tempfile.TemporaryDirectory(prefix="longvita-needle-") as directory:
        asked, prompts = itertools.tee(_questions(processor, kind, length, cells, rng, needle, directory))

        def prompt(question: haystack.Needle):
            if each_question is not None:
                each_question()
            return processor(question.sample.messages[:-1], max_tokens=length)

        batches = (prompt(question) for question in prompts)
        answers = generate_ids(model, batches, max_new_tokens=ANSWER_TOKENS[kind], tokens_at_once=TOKENS_AT_ONCE)
        return [score(processor.tokenizer.decode(ids), question.answer) for ids, question in zip(answers, asked, strict=True)]


def score(answer: str, expected: str) -> bool:
    """Whether the only word in the answer that holds a digit is `expected`: a number ("7") or a whole code ("Tunis8")."""
    return re.findall(r"\w*\d\w*", answer) == [expected]


def share(right: int, questions: int) -> dict:
    """{"accuracy", "questions", "interval"} of at least one question; the interval is Wilson's (1927), for 95 % confidence."""
    z2 = 1.959964**2
    rate = right / questions
    centre = (rate + z2 / (2 * questions)) / (1 + z2 / questions)
    reach = math.sqrt(z2 * (rate * (1 - rate) / questions + z2 / (4 * questions**2))) / (1 + z2 / questions)
    return {"accuracy": rate, "questions": questions, "interval": [max(0.0, centre - reach), min(1.0, centre + reach)]}


def _questions(processor, kind, length, cells, rng, needle, directory) -> Iterator[haystack.Needle]:
    if kind == "text":
        hay = haystack.TextHay(haystack.load_prose()[1], processor.tokenizer)
        for depth in cells:
            yield haystack.text_needle(hay, processor, length, rng, depth=depth, needle=needle)
        return
    hay = haystack.VideoHay(haystack.load_digits(processor.tile)[1])
    count = haystack.video_frames(processor, length)
    for number, depth in enumerate(cells):
        frames, digit = hay.frames(count, rng, depth=depth, needle=needle)
        path = os.path.join(directory, f"{number:04d}.mp4")
        haystack.write_video(path, frames)
        yield haystack.Needle(Sample(haystack.video_turns(path, digit), placeholders=False), str(digit))
