"""`longvita.load`: a model and its processor from a run directory or a plain checkpoint directory."""

import os
import warnings
from pathlib import Path

import torch

from longvita.config import LongVitaConfig
from longvita.model.checkpoint_io import WEIGHTS, CheckpointError, list_checkpoints, load_weights, newest_valid_checkpoint
from longvita.model.long_vita import LongVita

TOKENIZER = "tokenizer.json"


def load(path: str | os.PathLike, device=None, dtype: torch.dtype | None = None):
    """(model, processor), ready for `longvita.generate`.

    `path` is a run directory (config.json, tokenizer.json, checkpoints/step-*: the newest valid one is taken, with a warning for each that
    is skipped) or a directory that holds config.json, model.safetensors and tokenizer.json itself. `dtype` None keeps the stored one.
    ValueError if neither is there, or the weights do not fit the configuration.
    """
    from longvita.data.processor import Processor  # lazily: the model does not depend on the data pipeline

    path = Path(path)
    weights = find_weights(path)
    if not (path / TOKENIZER).is_file():
        raise ValueError(f"{path} has no {TOKENIZER}: put the tokenizer the model was trained with beside config.json")
    config = LongVitaConfig.load(path / "config.json")
    model = LongVita(config, device="meta")
    load_weights(model, weights, device=device, dtype=dtype)
    model.eval()
    return model, Processor.from_dir(path, config)


def find_weights(path: str | os.PathLike) -> Path:
    """The safetensors file that `load` would read."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: give a run directory, or one with config.json, {WEIGHTS} and {TOKENIZER}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: give a run directory, or one with config.json, {WEIGHTS} and {TOKENIZER}")
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    found = newest_valid_checkpoint(path)
    for directory, reason in found.skipped:
        warnings.warn(f"skipped {directory}: {reason}", stacklevel=3)
    if found.path is not None:
        return found.path / WEIGHTS
    if list_checkpoints(path):
        raise CheckpointError(f"no checkpoint in {path} is whole: " + "; ".join(f"{d.name}: {reason}" for d, reason in found.skipped))
    raise ValueError(f"{path} has neither {WEIGHTS} nor checkpoints/step-*: has the run saved a checkpoint yet?")
