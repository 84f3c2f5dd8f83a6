"""Texts to train a tokenizer on, and makers of small media files."""

import av
import numpy as np
from PIL import Image

TEXTS = ["The quick brown fox jumps over the lazy dog. ", "What digit is this? It is a seven.\n", "user assistant system 0123456789 "] * 5


def make_video(path, frames=12, fps=2, size=(48, 32), codec="mpeg4", **options):
    """A video whose frame i has the grey level 20 * i; returns its path."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 20 * i % 256, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_image(path, size=(64, 32), colour=(10, 200, 30)):
    Image.new("RGB", size, colour).save(path)
    return path
