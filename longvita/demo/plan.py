"""How much of everything the three sizes of the demo do. The stages derive from the recipes of the real model."""

from __future__ import annotations

from dataclasses import dataclass, field

from longvita.train.recipes import Recipe, stage1, stage2, stage3, stage4

# What a stage's rows are made of: shares of its tokens.
ALIGN = {"images": 0.4, "captions": 0.6}
KNOW = {"images": 0.1, "captions": 0.1, "videos": 0.25, "texts": 0.2, "mixed": 0.35}
MIX = {"images": 0.12, "videos": 0.4, "texts": 0.48}


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
class Plan:
    """The whole demo.

    minutes            as measured on two cores (AMD Zen 4), for the announcement
    *_steps            of pre-training: vision tower, decoder on lists of codes, decoder on codes in texts
    lengths, questions the needle grid: tokens, and questions a cell
    controls           questions a cell of the two controls at full length (needle removed; stage 2's model)
    """

    name: str
    minutes: float
    vision_steps: int
    list_steps: int
    text_steps: int
    stages: tuple[StagePlan, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    questions: int = 10
    controls: int = 8

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
        raise ValueError(f"expected a plan out of {', '.join(_SIZES)}, got {name!r}")
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
        minutes=4, long_lrs=(3e-4, 2e-4), vision_steps=200, list_steps=100, text_steps=250,
        steps=(100, 220, 60, 60), contexts=(512, 512, 1024, 2048), batches=(2, 4, 2, 1), lengths=(512, 1024, 2048), questions=4, controls=8,
    ),
    "default": dict(
        minutes=15, long_lrs=(1e-3, 4e-4), vision_steps=300, list_steps=200, text_steps=420,
        steps=(80, 200, 75, 150), contexts=(512, 512, 2048, 8192), batches=(4, 8, 4, 1), lengths=(1024, 2048, 4096, 8192), controls=8,
    ),
    "full": dict(
        minutes=35, long_lrs=(1e-3, 1e-3), vision_steps=500, list_steps=300, text_steps=500,
        steps=(200, 400, 150, 240), contexts=(512, 512, 2048, 8192), batches=(4, 8, 4, 1), lengths=(1024, 2048, 4096, 8192), questions=20,
        controls=16,
    ),
}  # fmt: skip
