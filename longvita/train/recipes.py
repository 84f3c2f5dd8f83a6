"""The four training stages of Long-VITA as frozen values, with the published numbers.

Each stage is a function; a smaller run derives from the same function by keyword:

    stage1()                                                    # the real 14B
    stage1(sequence_length=1024, global_batch=4, steps=200)     # the same stage in small

Source: the scripts that made the released weights (VITA-MLLM/Long-VITA). Two deliberate differences hold at every stage: the loss goes
through the masked head (upstream only in stage 4; the result is the same, the logits nobody reads are never made), and it is normalised
by the global number of supervised tokens (upstream averages per packed row, then over rows: `loss_normalisation="row"`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields

PARTS = ("vision", "projector", "text")
# Fields that may change between a checkpoint and its resumption, because no trained value depends on them.
FREE_FIELDS = frozenset({"checkpoint_every", "keep_checkpoints", "log_every", "max_bad_steps", "recompute"})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one training stage does.

    `lr` and `min_lr` are the ends of the cosine; `muon_lr` takes the place of `lr` for the matrices that Muon updates and follows the same
    curve. `global_batch` counts packed rows of `sequence_length` tokens per step over all ranks. `tensor_parallel` and `context_parallel`
    are the published mesh of the 14B model, kept as data: a run takes the mesh it is given.
    `dtype="bfloat16"` means autocast over float32 master weights; `"float32"` means no casting at all.
    """

    name: str
    sequence_length: int
    global_batch: int
    steps: int
    lr: float
    min_lr: float
    trainable: tuple[str, ...]
    reset: bool
    max_frames: int
    recompute: tuple[str, ...]
    tensor_parallel: int
    context_parallel: int
    warmup_ratio: float = 0.03
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    vision_lr_scale: float = 0.1
    vision_layer_decay: float = 0.9
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    loss_normalisation: str = "token"
    seed: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("trainable", "recompute"):
            object.__setattr__(self, name, _parts(name, getattr(self, name)))
        object.__setattr__(self, "betas", tuple(self.betas) if isinstance(self.betas, list | tuple) else ())
        _check(self)

    def warmup_steps(self) -> int:
        """Steps of linear warm-up: `warmup_ratio` of all steps, rounded."""
        return round(self.warmup_ratio * self.steps)

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at `step` (1 … steps): linear warm-up, then cosine; the last step runs at `min_lr / lr`.

        Megatron's formula, counted from 1, so that the first step does not run at rate 0.
        """
        warmup = self.warmup_steps()
        if step <= warmup:
            return step / warmup
        progress = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        floor = self.min_lr / self.lr
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def rows_per_rank(self, data_parallel: int) -> tuple[int, str | None]:
        """Packed rows each rank takes per step, and a message when the global batch had to be rounded to a multiple of the ranks."""
        rows = max(1, math.floor(self.global_batch / data_parallel + 0.5))
        if rows * data_parallel == self.global_batch:
            return rows, None
        return rows, (
            f"{self.name}: global batch {self.global_batch} is no multiple of {data_parallel} data-parallel ranks: "
            f"training with {rows * data_parallel} rows per step, {rows} per rank"
        )

    def to_dict(self) -> dict:
        """JSON-ready dictionary of every field (tuples become lists)."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping) -> Recipe:
        """The inverse of `to_dict`. ValueError for an unknown or a missing key, or a value that makes no recipe."""
        if not isinstance(data, Mapping):
            raise ValueError(f"recipe: expected an object with keys; got {data!r}")
        _known_fields("recipe", data)
        needed = [field.name for field in fields(cls) if field.default is MISSING]
        if missing := [name for name in needed if name not in data]:
            raise ValueError(f"recipe: expected the keys {_listed(needed)}; missing: {_listed(missing)}")
        return cls(**data)


def _parts(name: str, value) -> tuple[str, ...]:
    """Puts model parts into canonical order, so that equal recipes compare and hash equal."""
    given = [value] if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset) else value
    if unknown := [part for part in given if part not in PARTS]:
        raise ValueError(f"Recipe.{name}: expected parts out of {_listed(PARTS)}; got {', '.join(sorted(map(str, unknown)))}")
    return tuple(part for part in PARTS if part in given)


_CHOICES = {"dtype": ("bfloat16", "float32"), "optimizer": ("adamw", "muon"), "loss_normalisation": ("token", "row")}
_COUNTS = ("sequence_length", "global_batch", "steps", "max_frames", "checkpoint_every", "log_every", "max_bad_steps")
_POSITIVE = ("lr", "muon_lr", "clip", "eps", "vision_lr_scale", "vision_layer_decay")
_SHARES = ("warmup_ratio", "muon_momentum", "weight_decay")


def _check(recipe: Recipe) -> None:
    def expect(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"Recipe.{name}: expected {expected}; got {getattr(recipe, name)!r}")

    def number(value) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    expect(isinstance(recipe.name, str), "name", "a text")
    for name, allowed in _CHOICES.items():
        expect(getattr(recipe, name) in allowed, name, f"one of {_listed(allowed)}")
    for name in (*_COUNTS, "tensor_parallel", "context_parallel", "keep_checkpoints", "seed"):
        least = {"keep_checkpoints": 2, "seed": 0}.get(name, 1)
        why = ", as the newest may be in the process of being saved" if name == "keep_checkpoints" else ""
        value = getattr(recipe, name)
        expect(isinstance(value, int) and not isinstance(value, bool) and value >= least, name, f"a whole number of at least {least}{why}")
    for name in _POSITIVE:
        expect(number(getattr(recipe, name)) and getattr(recipe, name) > 0, name, "a number above 0")
    for name in _SHARES:
        expect(number(getattr(recipe, name)) and 0 <= getattr(recipe, name) < 1, name, "a number in [0, 1)")
    expect(len(recipe.betas) == 2 and all(number(beta) and 0 <= beta < 1 for beta in recipe.betas), "betas", "two numbers in [0, 1)")
    expect(number(recipe.min_lr) and 0 <= recipe.min_lr <= recipe.lr, "min_lr", f"a number from 0 to lr = {recipe.lr} (set both together)")
    expect(isinstance(recipe.reset, bool), "reset", "True or False")
    expect(bool(recipe.trainable), "trainable", f"at least one of {_listed(PARTS)}, or there is nothing to train")


def _listed(options) -> str:
    return ", ".join(map(str, options))


def _known_fields(where: str, keys: Iterable[str]) -> None:
    known = [field.name for field in fields(Recipe)]
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"{where}: unknown recipe field {key!r}{hint}")


def _derive(published: dict, overrides: dict) -> Recipe:
    _known_fields(published["name"], overrides)
    return Recipe(**{**published, **overrides})


def stage1(**overrides) -> Recipe:
    """Alignment: only the projector learns, on packed captions at 32K."""
    return _derive(dict(
        name="stage1", sequence_length=32_768, global_batch=512, steps=1000, lr=1e-3, min_lr=1e-5,
        trainable=("projector",), tensor_parallel=8, context_parallel=1, reset=True, max_frames=128, recompute=(),
    ), overrides)  # fmt: skip


def stage2(**overrides) -> Recipe:
    """General knowledge: everything learns at 16K, the ViT at a tenth of the rate with layer decay."""
    return _derive(dict(
        name="stage2", sequence_length=16_384, global_batch=540, steps=5000, lr=1e-5, min_lr=1e-7,
        trainable=PARTS, tensor_parallel=8, context_parallel=1, reset=True, max_frames=64, recompute=("vision", "projector"),
    ), overrides)  # fmt: skip


def stage3(**overrides) -> Recipe:
    """Long context, 128K: ViT frozen, samples of a row joined into one document."""
    return _derive(dict(
        name="stage3", sequence_length=131_072, global_batch=64, steps=1000, lr=5e-6, min_lr=1e-7,
        trainable=("projector", "text"), tensor_parallel=8, context_parallel=2, reset=False, max_frames=512, recompute=PARTS,
    ), overrides)  # fmt: skip


def stage4(**overrides) -> Recipe:
    """Long context, 1M: as stage 3 with 4096 frames."""
    return _derive(dict(
        name="stage4", sequence_length=1_048_576, global_batch=8, steps=500, lr=5e-6, min_lr=1e-7,
        trainable=("projector", "text"), tensor_parallel=8, context_parallel=8, reset=False, max_frames=4096, recompute=PARTS,
    ), overrides)  # fmt: skip


STAGES = {1: stage1, 2: stage2, 3: stage3, 4: stage4}
