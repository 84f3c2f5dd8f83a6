"""The three sizes of the demo: steps, lengths and questions of each. The stages derive from the recipes of the real model."""

from __future__ import annotations

from dataclasses import dataclass, field

from longvita.train.recipes import Recipe, stage1, stage2, stage3, stage4

# What a stage's rows are made of: shares of its tokens.
ALIGN = {"images": 0.4, "captions": 0.6}
KNOW = {"images": 0.1, "captions": 0.1, "videos": 0.25, "texts": 0.2, "mixed": 0.35}
MIX = {"images": 0.12, "videos": 0.52, "texts": 0.36}


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage: its recipe, and what its rows are made of."""

    number: int
    recipe: Recipe
    shares: dict[str, float] = field(default_factory=lambda: dict(MIX))

    @property
    def name(self) -> str:
        return f"stage{self.number}"


@dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """Pre-training of the two parts.

    *_steps      vision tower; decoder on lists of codes; decoder on texts, of one round
    rounds       at most this many on texts for each draw of the weights; the last one is that after which `recall_goal` is reached
    draws        at most this many initialisations of the weights: rounds and draws bound the time
    recall_goal  share of whole codes, and of marked frames told in words, that must be recalled from held-out short texts
    """

    vision_steps: int
    list_steps: int
    text_steps: int
    rounds: int = 3
    draws: int = 2
    recall_goal: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What counts as learned: shares of right answers, the needles' at full length."""

    images: float
    video: float
    text: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole demo.

    lengths          of the needle grid, in tokens
    questions        per cell, at the shorter lengths
    full_questions   per cell, at full length
    controls         per cell at full length, with the needle removed
    stage2_controls  per cell at full length, asked of the model after stage 2
    """

    name: str
    pretrain: PretrainPlan
    stages: tuple[StagePlan, ...]
    lengths: tuple[int, ...]
    goals: Goals
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    questions: int = 10
    full_questions: int = 20
    controls: int = 10
    stage2_controls: int = 4

    @property
    def grid_questions(self) -> tuple[int, ...]:
        """Questions a cell, for each length."""
        return (*(self.questions for _ in self.lengths[:-1]), self.full_questions)

    @property
    def context_tokens(self) -> int:
        return self.stages[-1].recipe.sequence_length


def _tiny(seed: int, **overrides) -> dict:
    """What a model of a million parameters wants instead of the published rates: float32, Muon for matrices, nothing recomputed."""
    return dict(
        dtype="float32", recompute=(), optimizer="muon", betas=(0.9, 0.98), warmup_ratio=0.1, tensor_parallel=1, context_parallel=1,
        seed=seed, checkpoint_every=50, **overrides,
    )  # fmt: skip


def make_plan(name: str, seed: int = 0) -> Plan:
    """ "quick" (2K tokens), "default" (8K) or "full" (8K, longer training and more questions)."""
    if name not in _SIZES:
        raise ValueError(f"expected one of {', '.join(_SIZES)} as the plan, got {name!r}")
    size = dict(_SIZES[name])
    steps, contexts, batches, (lr3, lr4) = (size.pop(key) for key in ("steps", "contexts", "batches", "long_lrs"))
    common = [_tiny(seed, steps=s, sequence_length=c, global_batch=b) for s, c, b in zip(steps, contexts, batches, strict=True)]
    recipes = (
        stage1(**common[0], lr=3e-3, min_lr=3e-4, muon_lr=0.01),
        stage2(**common[1], lr=2e-3, min_lr=2e-4, muon_lr=0.008, vision_lr_scale=0.3),
        # AdamW: Muon unlearns here what stage 2 has learned. Stage 4 takes one row a step, often with a single question in it: at stage 3's
        # rate its loss rises fourfold before it falls.
        stage3(**{**common[2], "optimizer": "adamw"}, lr=lr3, min_lr=lr3 / 10),
        stage4(**{**common[3], "optimizer": "adamw"}, lr=lr4, min_lr=lr4 / 20),
    )
    shares = (ALIGN, KNOW, MIX, MIX)
    stages = tuple(StagePlan(number=i + 1, recipe=r, shares=s) for i, (r, s) in enumerate(zip(recipes, shares, strict=True)))
    return Plan(name=name, stages=stages, **size)


_SIZES = {
    "quick": dict(
        long_lrs=(3e-4, 2e-4), steps=(60, 120, 30, 30), contexts=(1024, 1024, 1024, 2048), batches=(2, 4, 4, 2),
        pretrain=PretrainPlan(vision_steps=200, list_steps=40, text_steps=200), lengths=(512, 1024, 2048),
        goals=Goals(images=0.9, video=0.75, text=0.8), questions=4, controls=10,
    ),
    "default": dict(
        long_lrs=(1e-3, 4e-4), steps=(60, 150, 60, 90), contexts=(1024, 1024, 2048, 8192), batches=(2, 4, 4, 1),
        pretrain=PretrainPlan(vision_steps=300, list_steps=40, text_steps=240), lengths=(1024, 2048, 4096, 8192),
        goals=Goals(images=0.95, video=0.85, text=0.8),
    ),
    "full": dict(
        long_lrs=(1e-3, 4e-4), steps=(100, 300, 100, 150), contexts=(1024, 1024, 2048, 8192), batches=(2, 4, 4, 1),
        pretrain=PretrainPlan(vision_steps=500, list_steps=40, text_steps=300), lengths=(1024, 2048, 4096, 8192),
        goals=Goals(images=0.95, video=0.85, text=0.8), questions=20, full_questions=40, controls=20, stage2_controls=10,
    ),
}  # fmt: skip
