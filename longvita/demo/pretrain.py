"""What Long-VITA starts from: a vision tower that sees digits and a language model that recalls what it has read.

The published model starts from InternViT-300M and Qwen2.5-14B. Nobody has pre-trained parts of this demo's size, so it makes its own in a
few minutes: the tower learns to classify digits, the decoder to recall codes from lists and short texts, and to answer the questions about
images and videos with words in their place. Stages 1 to 4 then do what the real ones do.

Three things make the decoder learn this every time and at every length:
  * it does not start from noise: the attention heads that recall needs are laid out (`longvita.demo.induction`);
  * jumps in the position ids show it the distances of the longest context in short texts (`spread_positions`);
  * training stops not at a given loss, which mixes several tasks, but when a test is passed: the share of whole codes, name and digit, that
    it recalls from held-out texts. Until then it continues for another round, and after `plan.rounds` rounds with newly drawn weights.

Shapes: B sequences, L tokens, N images, T tokens of a packed row, M rows read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvita.data.processor import collate
from longvita.data.tiling import normalise
from longvita.demo.induction import recall_init
from longvita.demo.plan import PretrainPlan
from longvita.eval.haystack import (
    NAMES,
    TEXT_FACT,
    WORDS,
    Digits,
    TextHay,
    load_prose,
    mark,
    spelled_caption,
    spelled_images,
    spelled_video,
    text_needle,
)
from longvita.model.batch import IGNORE, Batch
from longvita.model.long_vita import LongVita
from longvita.train.optim import build_optimizers, set_lr
from longvita.train.recipes import stage2

Tell = Callable[[str], None]
IMAGES_PER_STEP = 128
RECENT = 20  # steps that a reported loss is the mean of
LIST_TOKENS, LISTS_PER_STEP = 128, 8
CODE_TOKENS, SPELLED_IMAGES, SPELLED_CAPTIONS, SPELLED_FRAMES = 2048, 12, 8, 700  # of a step on texts
REACH = 1.5  # positions spread this much further than the longest context, so that its greatest distances are not rare
JOINED = 16  # conversations in one document, every other step: what stages 3 and 4 make of a row
SPREAD = 0.75  # share of the documents whose positions jump
QUESTION_TOKENS = 24  # before a sample's first answer: its question and the template's tokens, which no jump may split
TESTED = {256: (16, 4), 1024: (8, 8)}  # of the test: tokens of a text → (texts, codes in each)
TESTED_FRAMES = {63: 40, 450: 40}  # frames of a video in words → videos


def recipe(steps: int, trainable: tuple[str, ...]):
    """The learning rates and schedule of both pre-trainings."""
    return stage2(
        name="pretrain", steps=steps, trainable=trainable, dtype="float32", recompute=(), optimizer="muon", lr=3e-3, min_lr=3e-4,
        muon_lr=0.01, betas=(0.9, 0.98), warmup_ratio=0.08, vision_lr_scale=1.0, vision_layer_decay=1.0,
    )  # fmt: skip


class Diverged(RuntimeError):
    """The loss or a gradient is not finite."""


def fit(
    model: LongVita, part: str, extra: list[nn.Parameter], steps: int, loss_at: Callable[[int], Tensor], name: str, tell: Tell,
    each_step: Callable[[], None],
) -> None:  # fmt: skip
    """Trains one part of the model, and `extra`, for `steps` steps on loss_at(1 … steps); new optimizers and a schedule of its own.

    Diverged, with the remedy, when the loss or a gradient is not finite. each_step() is called before every step.
    """
    plan = recipe(steps, (part,))
    model.set_trainable(plan.trainable)
    optimizers = build_optimizers({part: model.part(part)}, plan, model.config.vision.num_layers)
    head = torch.optim.AdamW(extra, lr=plan.lr, weight_decay=0.0) if extra else None
    parameters = [*model.part(part).values(), *extra]
    seen = []
    for step in range(1, steps + 1):
        each_step()
        loss = loss_at(step)
        loss.backward()
        seen.append(loss.item())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, plan.clip))
        if not (math.isfinite(seen[-1]) and math.isfinite(norm)):
            remedy = "start again with another --seed and a new --out directory"
            raise Diverged(f"{name}: at step {step} the loss was {seen[-1]} and its gradient's norm {norm}; {remedy}")
        set_lr(optimizers, plan.lr_factor(step))
        for optimizer in [*optimizers, *([head] if head else [])]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 4) == 0:
            tell(f"  {name}: step {step} of {steps}, loss {np.mean(seen[-RECENT:]):.3f}")


# ---- vision ----


def pretrain_vision(
    model: LongVita, digits: Digits, steps: int, seed: int, tell: Tell, each_step: Callable[[], None] = lambda: None
) -> None:
    """Classification of shifted digits, a third of them marked: which digit, and whether it is marked."""
    rng = np.random.default_rng([seed, 1])
    generator = torch.Generator().manual_seed(seed)
    hidden = model.config.vision.hidden_size
    classifier = nn.Linear(hidden, 11)  # ten digits, and whether the image is marked
    with torch.no_grad():
        classifier.weight.normal_(0, hidden**-0.5, generator=generator)
        classifier.bias.zero_()

    def loss_at(_: int) -> Tensor:
        images_NSS3, labels_N, marked_N = augmented(digits, rng)
        pixels_N3SS = np.empty((len(images_NSS3), 3, *images_NSS3.shape[1:3]), np.float32)
        normalise(images_NSS3, pixels_N3SS)
        features = model.model.vision_model(torch.from_numpy(pixels_N3SS))
        scores = classifier(features[:, 1:].mean(1))
        is_marked = F.binary_cross_entropy_with_logits(scores[:, 10], torch.from_numpy(marked_N.astype(np.float32)))
        return F.cross_entropy(scores[:, :10], torch.from_numpy(labels_N)) + is_marked

    fit(model, "vision", list(classifier.parameters()), steps, loss_at, "vision tower", tell, each_step)


def augmented(digits: Digits, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, S, S, 3) images moved by up to two pixels, their labels (N,), and which of them are marked (N,)."""
    chosen = rng.integers(len(digits), size=IMAGES_PER_STEP)
    images, marked_N = digits.images[chosen], rng.random(IMAGES_PER_STEP) < 1 / 3
    for image, (down, right), marked in zip(images, rng.integers(-2, 3, size=(len(images), 2)), marked_N, strict=True):
        image[:] = np.roll(image, (down, right), (0, 1))
        if marked:
            image[:] = mark(image)
    return images, digits.labels[chosen], marked_N


# ---- language ----


def pretrain_text(
    model: LongVita, processor, plan: PretrainPlan, longest: int, seed: int, tell: Tell, each_step: Callable[[], None] = lambda: None
) -> dict:
    """Draws the model's weights and trains the decoder, on lists of codes and then on texts, until it passes the test of `recall`.

    longest    tokens of the longest context that the stages will train: positions spread that far and beyond
    plan       how many steps a round has, how many rounds a draw, and how many draws there may be: the bound of the time that it takes
    Returns {"learned", "recall", "draws", "rounds" (of all draws), "text_steps"}; if "learned" is false, the model is that of the last
    draw.
    """
    tests = held_out_tests(processor, np.random.default_rng([seed, 3]))
    rounds = steps = 0
    for draw in range(plan.draws):
        recall_init(model, processor, seed + 1_000_003 * draw)
        lessons = Lessons(processor, longest, np.random.default_rng([seed, 2, draw]))
        lists = mean_loss(model, lessons.lists, plan.list_steps)
        try:
            fit(model, "text", [], plan.list_steps, lists, "decoder, lists of codes", tell, each_step)
            steps += plan.list_steps
            for number in range(plan.rounds):
                rounds += 1
                started = time.perf_counter()
                texts = mean_loss(model, lessons.texts, plan.text_steps)
                fit(model, "text", [], plan.text_steps, texts, "decoder, texts", tell, each_step)
                steps += plan.text_steps
                found = recall(model, tests)
                learned = min(found.values()) >= plan.recall_goal
                tell(
                    f"  recalled from held-out short texts: {found['text']:.2f} of the codes, {found['video']:.2f} of the marked frames in "
                    f"words (goal {plan.recall_goal:.2f}): {'learned' if learned else 'not learned yet'}"
                )
                if learned:
                    return {"learned": True, "recall": found, "draws": draw + 1, "rounds": rounds, "text_steps": steps}
                if number + 1 < plan.rounds:
                    tell(f"  another round, about {(time.perf_counter() - started) / 60:.1f} minutes more than estimated")
        except Diverged as problem:
            tell(f"  {problem}")
            recall_init(model, processor, seed + 1_000_003 * draw)  # what follows needs finite weights
            found = recall(model, tests)
        if draw + 1 < plan.draws:
            tell("  again, with newly drawn weights")
    tell(f"  NOT LEARNED in {rounds} rounds from {plan.draws} draws of the weights; the stages start from what there is")
    return {"learned": False, "recall": found, "draws": plan.draws, "rounds": rounds, "text_steps": steps}


def mean_loss(model: LongVita, batch_at: Callable[[float], Batch], steps: int) -> Callable[[int], Tensor]:
    """step → the loss per supervised token; `batch_at` takes the share of the steps that are done."""

    def loss_at(step: int) -> Tensor:
        total, count = model.loss(batch_at((step - 1) / steps))
        return total / count

    return loss_at


class Lessons:
    """What the decoder learns from: lists of codes, then texts and the questions of the demo in words, both of growing length."""

    def __init__(self, processor, longest: int, rng: np.random.Generator):
        self.processor, self.reach, self.rng = processor, int(REACH * longest), rng
        self.hay = TextHay(load_prose()[0], processor.tokenizer)
        self.codes = CodeLists(processor.tokenizer, self.hay)
        self._joined = False

    def lists(self, done: float) -> Batch:
        return self.codes.batch(self.rng, gap=0 if done < 0.5 else 8)

    def texts(self, done: float) -> Batch:
        rng = self.rng
        tokens, frames = ((256, 6), (256, 20), (512, 63), (512, 200), (1024, 450))[int(5 * done)]
        ask = 4 if tokens == 256 else 8
        samples = [text_needle(self.hay, self.processor, tokens, rng, facts=ask, ask=ask).sample for _ in range(CODE_TOKENS // tokens)]
        samples += [spelled_images(int(count), rng) for count in rng.choice((1, 1, 2, 3, 4), size=SPELLED_IMAGES)]
        samples += [spelled_caption(int(count), rng) for count in rng.integers(1, 13, size=SPELLED_CAPTIONS)]
        videos = min(24, max(6, 2 * SPELLED_FRAMES // frames))
        samples += [spelled_video(int(count), rng) for count in rng.integers(1, frames + 1, size=videos)]
        encoded = [self.processor.encode(samples[i]) for i in rng.permutation(len(samples))]
        self._joined = not self._joined
        batch = collate(encoded[:JOINED], reset=False) if self._joined else collate(encoded, reset=True)
        return spread_positions(batch, self.reach, rng)


def spread_positions(batch: Batch, longest: int, rng: np.random.Generator) -> Batch:
    """The batch with jumps in its position ids, so that short documents show the distances of one of `longest` tokens.

    As in PoSE (Zhu et al., 2023, arXiv:2309.10400): positions jump once in every sample, somewhere before its first question, and those of
    a document end anywhere below `longest`. A quarter of the documents keep theirs.
    """
    jumps_T = np.zeros(batch.num_tokens, np.int64)
    supervised_T = batch.labels.numpy() != IGNORE
    cuts = []
    for start, end in pairwise(batch.sample_cu_seqlens.tolist()):
        before = int(np.argmax(supervised_T[start:end])) - QUESTION_TOKENS
        cuts.append(start + int(rng.integers(max(1, before))))
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        room = longest - (end - start)
        if room > 0 and rng.random() < SPREAD:
            inside = [cut for cut in cuts if start <= cut < end]
            shares = rng.dirichlet(np.ones(len(inside))) * rng.integers(room)
            jumps_T[inside] = shares.astype(np.int64)
            jumps_T[start:end] = jumps_T[start:end].cumsum()
    return Batch(**{**vars(batch), "position_ids": batch.position_ids + torch.from_numpy(jumps_T)})


# ---- the test ----


def held_out_tests(processor, rng: np.random.Generator) -> dict[str, list[Batch]]:
    """{"text": texts of held-out prose with codes in them and questions about all, "video": marked frames in words}."""
    hay = TextHay(load_prose()[1], processor.tokenizer)

    def text(tokens: int, codes: int):
        return processor.encode(text_needle(hay, processor, tokens, rng, facts=codes, ask=codes).sample)

    texts = [collate([text(tokens, codes) for _ in range(count)], reset=True) for tokens, (count, codes) in TESTED.items()]
    videos = [
        collate([processor.encode(spelled_video(frames, rng)) for _ in range(count)], reset=True) for frames, count in TESTED_FRAMES.items()
    ]
    return {"text": texts, "video": videos}


@torch.no_grad()
def recall(model: LongVita, tests: dict[str, list[Batch]]) -> dict[str, float]:
    """The share of answers of each test of which every token, the end included, is the model's first choice when the ones before it are
    given: whole codes, not digits alone."""
    return {kind: float(torch.cat([_answered(model, batch) for batch in batches]).float().mean()) for kind, batches in tests.items()}


def _answered(model: LongVita, batch: Batch) -> Tensor:
    """(answers,) bool. An answer is a run of supervised rows."""
    targets_T = batch.shifted_labels()
    rows_M = torch.nonzero(targets_T != IGNORE)[:, 0]
    right_M = model.logits(batch, rows_M).argmax(-1) == targets_T[rows_M]
    answer_M = torch.cumsum(rows_M.diff(prepend=rows_M[:1]) > 1, 0)
    wrong = torch.zeros(int(answer_M[-1]) + 1, dtype=torch.int64).index_add_(0, answer_M, (~right_M).long())
    return wrong == 0


class CodeLists:
    """Sequences like "Oslo3. Rome7. Oslo3.": a digit is supervised where its name has been seen before in the same sequence."""

    def __init__(self, tokenizer, hay: TextHay):
        self.digits = [tokenizer.encode(str(digit)) for digit in range(10)]
        self.names = [tokenizer.encode(" " + name) for name in NAMES]
        words = [tokenizer.encode(" " + word) for word in WORDS]
        if any(len(ids) != 1 for ids in [*self.digits, *self.names, *words]):
            raise ValueError("expected one token for every name and digit: train the tokenizer on texts in which the codes are frequent")
        self.lead = tokenizer.encode(" " + TEXT_FACT.split("{")[0].rstrip())
        self.stop = tokenizer.encode(".")
        self.prose = np.asarray(tokenizer.encode(hay.prose[:200_000]))

    def batch(self, rng: np.random.Generator, gap: int) -> Batch:
        rows = [self.row(rng, gap) for _ in range(LISTS_PER_STEP)]
        batch = Batch.from_ids([ids for ids, _ in rows])
        labels = torch.tensor([label for _, row in rows for label in row])
        return Batch(**{**vars(batch), "labels": labels})

    def row(self, rng: np.random.Generator, gap: int) -> tuple[list[int], list[int]]:
        """(ids, labels) of LIST_TOKENS tokens; up to `gap` tokens of prose between codes."""
        chosen = rng.permutation(len(self.names))[: rng.integers(6, 25)]
        digits = rng.integers(10, size=len(chosen))
        ids, labels, seen = [], [], set()
        while len(ids) < LIST_TOKENS:
            place = int(rng.integers(len(chosen)))
            (digit,) = self.digits[digits[place]]
            start = (self.lead if rng.random() < 0.3 else []) + self.names[chosen[place]]
            start_prose = int(rng.integers(len(self.prose) - gap))
            filler = self.prose[start_prose : start_prose + int(rng.integers(gap + 1))].tolist()
            ids += [*start, digit, *self.stop, *filler]
            labels += [-100] * len(start) + [digit if place in seen else -100] + [-100] * (len(self.stop) + len(filler))
            seen.add(place)
        return ids[:LIST_TOKENS], labels[:LIST_TOKENS]
