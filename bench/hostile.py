"""Media files that must be refused: they promise more than they hold, or more than is allowed.

tests/data/test_media.py checks the reason and the memory; `bench/host.py` measures time and peak memory.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import av
import numpy as np

REASONS = {  # file name → the reason that `MediaError` gives
    "bomb.png": "too_large",
    "cut.png": "truncated",
    "sized.mp4": "too_large",
    "noise.mkv": "broken",
    "sparse.mp4": "broken",
}


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG file of 8-bit RGB."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def write(folder: Path) -> None:
    """Write the files that `REASONS` names."""
    (folder / "bomb.png").write_bytes(png_header(30_000, 30_000) + chunk(b"IDAT", zlib.compress(bytes(2**26), 9)))
    (folder / "cut.png").write_bytes(png_header(5000, 5000) + chunk(b"IDAT", zlib.compress(bytes(2**20), 9)))
    _write_video(folder / "sized.mp4", 5120, 2880)
    (folder / "noise.mkv").write_bytes(b"\x1a\x45\xdf\xa3" + np.random.default_rng(0).bytes(10**6))
    with open(folder / "sparse.mp4", "wb") as file:  # 8 GiB, of which 32 bytes are on the disk
        file.write((folder / "sized.mp4").read_bytes()[:32])
        file.truncate(2**33)


def _write_video(path: Path, width: int, height: int) -> None:
    """Two black frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
