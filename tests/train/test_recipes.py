"""The published table number by number, the schedule by hand, derived recipes, and what a wrong one is told."""

import dataclasses
import json
import math
import re

import pytest

from longvita.train.recipes import PARTS, STAGES, Recipe, stage1, stage2, stage3, stage4

# long_vita.md section 2 / the scripts of the released weights
PUBLISHED = {
    1: dict(
        sequence_length=32_768, global_batch=512, steps=1000, lr=1e-3, min_lr=1e-5, trainable=("projector",),
        tensor_parallel=8, context_parallel=1, reset=True, max_frames=128, recompute=(),
    ),
    2: dict(
        sequence_length=16_384, global_batch=540, steps=5000, lr=1e-5, min_lr=1e-7, trainable=("vision", "projector", "text"),
        tensor_parallel=8, context_parallel=1, reset=True, max_frames=64, recompute=("vision", "projector"),
    ),
    3: dict(
        sequence_length=131_072, global_batch=64, steps=1000, lr=5e-6, min_lr=1e-7, trainable=("projector", "text"),
        tensor_parallel=8, context_parallel=2, reset=False, max_frames=512, recompute=("vision", "projector", "text"),
    ),
    4: dict(
        sequence_length=1_048_576, global_batch=8, steps=500, lr=5e-6, min_lr=1e-7, trainable=("projector", "text"),
        tensor_parallel=8, context_parallel=8, reset=False, max_frames=4096, recompute=("vision", "projector", "text"),
    ),
}  # fmt: skip
EVERY_STAGE = dict(
    betas=(0.9, 0.999), weight_decay=0.0, clip=1.0, warmup_ratio=0.03, dtype="bfloat16", vision_lr_scale=0.1, vision_layer_decay=0.9,
    optimizer="adamw", loss_normalisation="token",
)  # fmt: skip


@pytest.mark.parametrize("number", PUBLISHED)
def test_published_numbers(number):
    stage = STAGES[number]()
    assert stage.name == f"stage{number}"
    for field, value in {**PUBLISHED[number], **EVERY_STAGE}.items():
        assert getattr(stage, field) == value, field


def test_schedule_by_hand():
    stage = stage1()
    assert stage.warmup_steps() == 30 and stage2().warmup_steps() == 150 and stage3().warmup_steps() == 30 and stage4().warmup_steps() == 15
    lr = [stage.lr * stage.lr_factor(step) for step in range(1, 1001)]
    assert lr[0] == pytest.approx(1e-3 / 30)
    assert lr[14] == pytest.approx(5e-4)
    assert lr[29] == pytest.approx(1e-3)
    assert lr[30] == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi / 970)))
    assert lr[514] == pytest.approx((1e-3 + 1e-5) / 2)  # half of the cosine: 30 + 485
    assert lr[999] == pytest.approx(1e-5)
    assert all(a > b for a, b in zip(lr[29:], lr[30:], strict=False)) and max(lr) == lr[29]


@pytest.mark.parametrize(("steps", "ratio"), [(1, 0.03), (2, 0.03), (5, 0.9), (7, 0.0)])
def test_schedule_of_short_runs_ends_at_the_minimum(steps, ratio):
    stage = stage1(steps=steps, warmup_ratio=ratio)
    factors = [stage.lr_factor(step) for step in range(1, steps + 1)]
    assert factors[-1] == pytest.approx(0.01)
    assert all(0 < factor <= 1 for factor in factors)


def test_derived_recipe_keeps_the_rest():
    small = stage3(sequence_length=2048, global_batch=4, steps=100, lr=1e-3)
    changed = {f.name for f in dataclasses.fields(Recipe) if getattr(small, f.name) != getattr(stage3(), f.name)}
    assert changed == {"sequence_length", "global_batch", "steps", "lr"}
    assert stage1(trainable=["text", "vision"]) == stage1(trainable={"vision", "text"})
    assert stage1(trainable="text").trainable == ("text",) and stage1(trainable=PARTS).trainable == PARTS


@pytest.mark.parametrize(
    ("global_batch", "ranks", "rows", "message"),
    [
        (512, 1, 512, None),
        (512, 192, 3, "512 is no multiple of 192 data-parallel ranks: training with 576 rows per step, 3 per rank"),
        (540, 192, 3, "540 is no multiple of 192"),
        (8, 64, 1, "8 is no multiple of 64 .* 64 rows per step, 1 per rank"),
    ],
)
def test_global_batch_rounds_to_the_mesh(global_batch, ranks, rows, message):
    got, note = stage1(global_batch=global_batch).rows_per_rank(ranks)
    assert got == rows
    assert note is None if message is None else re.search(message, note)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"learning_rate": 1}, "stage1: unknown recipe field 'learning_rate'"),
        ({"warmup_ration": 1}, "did you mean 'warmup_ratio'"),
        ({"zzz": 1}, "known: name, sequence_length"),
        ({"trainable": ("vit",)}, "Recipe.trainable: expected parts out of vision, projector, text; got vit"),
        ({"trainable": ()}, "nothing to train"),
        ({"dtype": "float16"}, "Recipe.dtype: expected one of bfloat16, float32; got 'float16'"),
        ({"optimizer": "sgd"}, "expected one of adamw, muon"),
        ({"loss_normalisation": "mean"}, "expected one of token, row"),
        ({"steps": 0}, "Recipe.steps: expected a whole number of at least 1; got 0"),
        ({"global_batch": 1.5}, "Recipe.global_batch"),
        ({"lr": 0.0, "min_lr": 0.0}, "Recipe.lr: expected a number above 0"),
        ({"lr": 1e-6}, r"min_lr: expected a number from 0 to lr = 1e-06 \(set both together\); got 1e-05"),
        ({"lr": "1e-3"}, "Recipe.lr: expected a number above 0; got '1e-3'"),
        ({"lr": float("nan")}, "Recipe.lr"),
        ({"betas": (0.9,)}, "Recipe.betas: expected two numbers"),
        ({"betas": 0.9}, "Recipe.betas: expected two numbers"),
        ({"reset": 1}, "Recipe.reset: expected True or False; got 1"),
        ({"seed": True}, "Recipe.seed"),
        ({"weight_decay": -0.1}, "Recipe.weight_decay"),
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
        ({"keep_checkpoints": 1}, "at least 2, as the newest may be in the process of being saved"),
    ],
)
def test_wrong_recipes_are_explained(overrides, match):
    with pytest.raises(ValueError, match=match):
        stage1(**overrides)


def test_recipes_are_json_ready_and_frozen():
    assert json.loads(json.dumps(stage4().to_dict()))["trainable"] == ["projector", "text"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage1().lr = 1.0
