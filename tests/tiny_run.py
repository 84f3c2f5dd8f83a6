"""A run directory with an untrained model of 0.2 million parameters and a real tokenizer: what commands need to start on."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import longvita
from longvita.data.template import ChatTokenizer
from longvita.model.checkpoint_io import save_weights

TEXTS = ["Which digit is this?", "What is the capital of Italy?", "A seven. Digits appear. Rome."]


def tokenizer(vocab_size=288):
    return ChatTokenizer.train_bpe(TEXTS, vocab_size)


def config(chat_tokenizer):
    tiny = longvita.presets["tiny"]
    return dataclasses.replace(
        tiny,
        vision=dataclasses.replace(tiny.vision, num_layers=1),
        text=dataclasses.replace(tiny.text, num_layers=1, vocab_size=288, max_position_embeddings=4096),
        tokens=chat_tokenizer.token_ids,
    )


def make_run(directory):
    """config.json, tokenizer.json and model.safetensors in `directory`; the same bits every time."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    chat_tokenizer = tokenizer()
    model = longvita.LongVita(config(chat_tokenizer)).init_weights(0)
    with torch.no_grad():  # an untrained head might end every answer at once: it shall prefer letters
        model.lm_head.weight[list(model.config.tokens.eos)] = 0.0
    model.config.save(directory / "config.json")
    chat_tokenizer.save(directory)
    save_weights(model, directory / "model.safetensors")
    return directory


def make_image(path, size=32):
    """A picture with a gradient, so that it is neither blank nor large."""
    ramp = np.linspace(0, 255, size, dtype=np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    Image.fromarray(np.stack([across, down, np.full_like(across, 128)], axis=-1)).save(path)
    return path


def make_video(directory, frames=3):
    """A directory of frames, which counts as a video at one frame per second."""
    directory.mkdir()
    for i in range(frames):
        make_image(directory / f"{i}.png", 32 + i)
    return directory
