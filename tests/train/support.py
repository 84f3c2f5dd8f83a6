"""A very small Long-VITA, packed rows for it, and a training run as a program of its own (for tests that kill it).

python -m tests.train.support RUN_DIR STEPS [CHECKPOINT_EVERY]
"""

import os
import signal
import sys
from types import SimpleNamespace

import torch

from longvita.config import LongVitaConfig, ProjectorConfig, TextConfig, TokenIds, VisionConfig
from longvita.model.batch import Batch
from longvita.model.long_vita import LongVita
from longvita.train.recipes import stage2
from longvita.train.trainer import Trainer

CONFIG = LongVitaConfig(
    vision=VisionConfig(image_size=8, patch_size=2, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=1),
    projector=ProjectorConfig(hidden_size=48),
    text=TextConfig(
        vocab_size=80, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32,
        max_position_embeddings=256,
    ),
    tokens=TokenIds.after(60),
)  # fmt: skip
TOKENS = 48  # in a packed row


def make_model(seed: int = 0) -> LongVita:
    return LongVita(CONFIG).init_weights(seed, std=0.1)


def make_row(seed: int, *, tokens: int = TOKENS, supervised: int | None = None) -> Batch:
    """Two documents, two tiles, the last `supervised` tokens (default: half) labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (tokens,), generator=generator)
    boundaries = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    positions = torch.cat([torch.arange(tokens // 3), torch.arange(tokens - tokens // 3)])
    images = torch.randn(2, 3, 8, 8, generator=generator)
    indices = torch.stack([torch.zeros(2, 4, dtype=torch.int64), torch.arange(8).view(2, 4) + tokens // 3])  # in the second document
    supervised = tokens // 2 if supervised is None else supervised
    labels = torch.where(torch.arange(tokens) >= tokens - supervised, ids, -100)
    return Batch(ids, boundaries, boundaries, positions, images, indices, labels)


class Rows:
    """The loader's interface over a list of packed rows."""

    def __init__(self, rows: list[Batch]):
        self.rows, self.position = rows, 0
        self.stats = SimpleNamespace(dropped={"too long": 3})

    def __iter__(self):
        while self.position < len(self.rows):
            self.position += 1
            yield self.rows[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def recipe(**overrides):
    """Stage 2 in small: every part learns, in float32."""
    small = {"sequence_length": TOKENS, "global_batch": 2, "steps": 4, "lr": 1e-3, "dtype": "float32", "recompute": (), "seed": 1}
    return stage2(**{**small, **overrides})


def make_trainer(run_dir, *, rows=None, model=None, on_step=None, threads=None, progress="quiet", **overrides) -> Trainer:
    loader = Rows([make_row(seed) for seed in range(7)] if rows is None else rows)
    model = make_model() if model is None else model
    return Trainer(model, loader, recipe(**overrides), run_dir, config=CONFIG, progress=progress, on_step=on_step, threads=threads)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} differ, first {different[:3]}"


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """All of it within `tolerance` of its norm, and no element off by more than twice `tolerance` of the largest: sums in another order
    differ relatively more where they cancel (the keys' bias has an all but vanishing gradient).
    """
    assert a.keys() == b.keys()
    difference, whole = (torch.cat([value.flatten() for value in values]) for values in ([a[name] - b[name] for name in b], b.values()))
    assert difference.norm() <= tolerance * whole.norm(), float(difference.norm() / whole.norm())
    assert difference.abs().max() <= 2 * tolerance * whole.abs().max(), float(difference.abs().max() / whole.abs().max())


def main(run_dir: str, steps: str, checkpoint_every: str = "5") -> None:
    """Trains; kills itself without warning after step $KILL_AFTER."""
    kill_after = int(os.environ.get("KILL_AFTER", "0"))

    def maybe_die(step, row):
        print(step, flush=True)
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    make_trainer(run_dir, steps=int(steps), checkpoint_every=int(checkpoint_every), optimizer="muon", on_step=maybe_die).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
