"""What Long-VITA starts from: a vision tower that sees digits and a language model that recalls what it has read.

The published model starts from InternViT-300M and Qwen2.5-14B. Nobody has pre-trained parts of this demo's size, so it makes its own in a
few minutes: the tower learns to classify digits, the decoder to recall codes from lists and short texts, and to answer the questions about
images and videos with words in their place. Stages 1 to 4 then do what the real ones do.

The decoder does not start from noise. How a transformer recalls ("induction": a head that looks one token back, and a later one that looks
for what followed the present token before) is known, and takes a small model minutes to discover; `recall_init` puts that pair of heads in
place, as in mimetic initialisation (Trockman and Kolter, 2023). Everything remains trainable.

Shapes: B sequences, L tokens, N images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvita.data.processor import collate
from longvita.data.tiling import normalise
from longvita.eval.haystack import (
    NAMES,
    TEXT_FACT,
    WORDS,
    Digits,
    TextHay,
    mark,
    spelled_caption,
    spelled_images,
    spelled_video,
    text_needle,
)
from longvita.model.batch import Batch
from longvita.model.long_vita import LongVita
from longvita.train.optim import build_optimizers, set_lr
from longvita.train.recipes import stage2

Tell = Callable[[str], None]
IMAGES_PER_STEP = 128
RECENT = 20  # steps that a reported loss is the mean of
LIST_TOKENS, LISTS_PER_STEP = 128, 8
CODE_TOKENS, SPELLED_IMAGES, SPELLED_CAPTIONS, SPELLED_VIDEOS = 2048, 12, 8, 12  # of a step on texts
# Recall comes all at once, mostly between step 100 and 300, as the seed and the last bits of the arithmetic have it: the loss is 0.7 before
# it and 0.03 to 0.08 after it. A second round costs a minute or two; stages 2 to 4 have also learned it later, from a loss of 0.16.
RECALLS = 0.12
JOINED = 16  # conversations in one document, every other step: what stages 3 and 4 make of a row


def recipe(steps: int, trainable: tuple[str, ...]):
    """The learning rates and schedule of both pre-trainings."""
    return stage2(
        name="pretrain", steps=steps, trainable=trainable, dtype="float32", recompute=(), optimizer="muon", lr=3e-3, min_lr=3e-4,
        muon_lr=0.01, betas=(0.9, 0.98), warmup_ratio=0.08, vision_lr_scale=1.0, vision_layer_decay=1.0,
    )  # fmt: skip


def _fit(
    model: LongVita, part: str, extra: list[nn.Parameter], steps: int, loss_at: Callable[[int], Tensor], name: str, tell: Tell,
    goal: float = math.inf,
) -> None:  # fmt: skip
    """`steps` steps, and as many again, from the schedule's beginning, if the mean loss of the last RECENT is above `goal` then."""
    plan = recipe(steps, (part,))
    model.set_trainable(plan.trainable)
    optimizers = build_optimizers({part: model.part(part)}, plan, model.config.vision.num_layers)
    head = torch.optim.AdamW(extra, lr=plan.lr, weight_decay=0.0) if extra else None
    parameters = [*model.part(part).values(), *extra]
    seen = []
    for step in range(1, 2 * steps + 1):  # counts on, for the batches
        if step == steps + 1:
            if np.mean(seen[-RECENT:]) <= goal:
                break
            tell(f"  {name}: not learned yet, once more")
        loss = loss_at(step)
        loss.backward()
        seen.append(loss.item())
        if not math.isfinite(seen[-1]):
            raise RuntimeError(f"{name}: the loss became {seen[-1]} at step {step}: start the demo again with another --seed")
        torch.nn.utils.clip_grad_norm_(parameters, plan.clip)
        set_lr(optimizers, plan.lr_factor((step - 1) % steps + 1))
        for optimizer in [*optimizers, *([head] if head else [])]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 4) == 0:
            tell(f"  {name}: step {(step - 1) % steps + 1} of {steps}, loss {np.mean(seen[-RECENT:]):.3f}")


# ---- vision ----


def pretrain_vision(model: LongVita, digits: Digits, steps: int, seed: int, tell: Tell) -> None:
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

    _fit(model, "vision", list(classifier.parameters()), steps, loss_at, "vision tower", tell)


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


@torch.no_grad()
def recall_init(model: LongVita, seed: int) -> None:
    """Weights of the whole model: scaled normal, with a previous-token head in layer 0 and a matching head in layer 1.

    A bias in q and k alone makes attention depend on distance alone: with k = c and q = c turned back by one position, RoPE's score peaks
    at distance 1. Its values (a projection A of the token) are written along other directions B; the matching head then compares A of the
    present token with B of every earlier one, which is A of the token before that.
    """
    text = model.config.text
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            gain = 0.35 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.7
            weight.normal_(0, gain * weight.shape[1] ** -0.5, generator=generator)
        elif name.endswith(("ls1", "ls2")):
            weight.fill_(0.1)
    model.model.embed_tokens.weight.normal_(0, 0.3, generator=generator)

    size, group = text.head_dim, text.num_heads // text.num_kv_heads
    basis = torch.linalg.qr(torch.randn(text.hidden_size, 2 * size, generator=generator)).Q.T
    present, previous = basis[:size], basis[size:]
    fast = size // 4  # the quickest half of RoPE's frequencies tell neighbours apart
    angles = text.rope_theta ** (-torch.arange(fast) / (size // 2))
    strength = 6.0  # c: the score of distance 1 exceeds that of 2 by about 0.6 c² / sqrt(size)

    back, match = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    back.k_proj.weight[:size] *= 0.1
    back.k_proj.bias[:fast] = strength
    back.v_proj.weight[:size] = present
    match.k_proj.weight[:size] = 2 * previous
    for head in range(group):
        rows = slice(head * size, (head + 1) * size)
        back.q_proj.weight[rows] *= 0.1
        back.q_proj.bias[rows][:fast] = strength * angles.cos()
        back.q_proj.bias[rows][size // 2 : size // 2 + fast] = -strength * angles.sin()
        back.o_proj.weight[:, rows] = previous.T / group
        match.q_proj.weight[rows] = 2 * present


def pretrain_text(model: LongVita, processor, hay: TextHay, list_steps: int, text_steps: int, seed: int, tell: Tell) -> None:
    """Recall from lists of codes in which some come back; then from texts of growing length, and the questions of the demo in words."""
    rng = np.random.default_rng([seed, 2])
    maker = CodeLists(processor.tokenizer, hay)

    def lists(step: int) -> Batch:
        return maker.batch(rng, gap=0 if step < list_steps / 2 else 8)

    def texts(step: int) -> Batch:
        tokens = (256, 256, 512, 512, 1024)[min(4, 5 * step // (text_steps + 1))]
        ask = 4 if tokens == 256 else 8
        samples = [text_needle(hay, processor, tokens, rng, facts=ask, ask=ask).sample for _ in range(CODE_TOKENS // tokens)]
        samples += [spelled_images(int(count), rng) for count in rng.choice((1, 1, 2, 3, 4), size=SPELLED_IMAGES)]
        samples += [spelled_caption(int(count), rng) for count in rng.integers(1, 13, size=SPELLED_CAPTIONS)]
        samples += [spelled_video(int(count), rng) for count in rng.integers(1, 64, size=SPELLED_VIDEOS)]
        encoded = [processor.encode(samples[i]) for i in rng.permutation(len(samples))]
        return collate(encoded[:JOINED] if step % 2 else encoded, reset=step % 2 == 0)

    def mean_loss(batch: Batch) -> Tensor:
        total, count = model.loss(batch)
        return total / count

    _fit(model, "text", [], list_steps, lambda step: mean_loss(lists(step)), "decoder, lists of codes", tell)
    _fit(model, "text", [], text_steps, lambda step: mean_loss(texts(step)), "decoder, texts", tell, RECALLS)


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
