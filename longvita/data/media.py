"""Opens images and videos that nobody vouches for: within limits, one frame at a time, with one kind of error.

    image = open_image("photo.jpg", limits);  image.size;  image.load()    # the size comes from the header, before anything is decoded
    video = open_video("film.mp4", limits);   video.num_frames;  video.read(indices, tile)      # also directories and arrays of frames

Paths are local files below `limits.root` (after following links); no URL, no protocol and no playlist is ever followed.
Shapes: F frames, S pixels per side of a tile.
"""

import contextlib
import errno
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from longvita.data.schema import SCHEME, DataError
from longvita.data.tiling import square

if TYPE_CHECKING:
    from longvita.data.video import FileVideo

_DIGITS = re.compile(r"([0-9]+)")
_FRAME_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What Pillow's decoders raise on broken files: truncation is an OSError, the rest depends on where the bytes go wrong.
_IMAGE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class MediaError(DataError):
    """An image or a video that cannot or must not be read.

    reason: refused, outside_root, missing, too_large (bytes or pixels), endless (seconds or frames), empty, truncated or broken.
    """


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What a medium may be and cost. The defaults are meant for files from strangers.

    root              only files below this directory, after following links; relative paths start there. None: anywhere on this machine
    allow             kinds of sources: "path" (files and directories), "memory" (arrays, images, bytes)
    max_pixels        of an image, by its header; 2**25 holds 8K UHD
    max_frame_pixels  of a video's frame; the default holds 4K
    max_frames        taken from one video (4096 fill Long-VITA's longest context)
    max_seconds       length of a video
    max_decoded       frames of a video, taken or not
    max_bytes         of a video file
    max_image_bytes   of an image file
    image_formats, video_formats, video_codecs   by the names of Pillow and FFmpeg; the content counts, not the file's name
    """

    root: str | None = None
    allow: tuple[str, ...] = ("path", "memory")
    max_pixels: int = 2**25
    max_frame_pixels: int = 4096 * 2304
    max_frames: int = 4096
    max_seconds: float = 6 * 3600.0
    max_decoded: int = 2_000_000
    max_bytes: int = 2**33
    max_image_bytes: int = 2**26
    image_formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
    video_formats: tuple[str, ...] = ("mov", "matroska", "avi")
    video_codecs: tuple[str, ...] = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "mpeg1video", "mpeg2video")

    def __post_init__(self):
        for name in ("max_pixels", "max_frame_pixels", "max_frames", "max_seconds", "max_decoded", "max_bytes", "max_image_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"MediaLimits.{name} must be a positive number, got {value!r}")
        for name, known in (("allow", ("path", "memory")), ("image_formats", None), ("video_formats", None), ("video_codecs", None)):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"MediaLimits.{name} must be a list of names, got {value!r}")
            if known and not set(value) <= set(known):
                raise ValueError(f"MediaLimits.{name} knows {', '.join(known)}, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.root is not None:
            root = os.path.realpath(self.root)
            if not os.path.isdir(root):
                raise ValueError(f"MediaLimits.root must be an existing directory, got {self.root!r}; create it or name another")
            object.__setattr__(self, "root", root)


# ---- paths ----


def resolve(source: str | os.PathLike, limits: MediaLimits) -> str:
    """The real path of a file or directory, links followed. MediaError "refused", "outside_root" or "missing"."""
    text = os.fspath(source)
    allow("path", limits, text)
    if not isinstance(text, str) or SCHEME.match(text) or "\0" in text:
        raise MediaError(
            "refused", f"expected the path of a local file, got {short(text)}; URLs and protocols are not read: fetch the file first"
        )
    if limits.root is not None:
        text = os.path.join(limits.root, text)
    real = os.path.realpath(text)
    if limits.root is not None and os.path.commonpath([limits.root, real]) != limits.root:
        raise MediaError(
            "outside_root", f"expected a file below the media root {limits.root}, got {short(source)}, which leads out of it; move the file"
        )
    try:
        mode = os.stat(real).st_mode
    except OSError as error:
        raise MediaError("missing", f"expected a readable file, got {short(source)}: {error.strerror}; check the path") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise MediaError(
            "refused", f"expected a regular file or a directory, got {short(source)}, a device or a pipe; copy the data into a file"
        )
    return real


def open_file(real: str, max_bytes: float) -> BinaryIO:
    """A binary file. The path is already real: it is opened without following links, and checked again once open."""
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "outside_root" if error.errno == errno.ELOOP else "missing"
        raise MediaError(
            reason, f"expected a readable file, got {short(real)}: {error.strerror}; check the path and its permissions"
        ) from None
    file = os.fdopen(descriptor, "rb")
    status = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise MediaError("refused", f"expected a regular file, got {short(real)}; name a file")
        check_bytes(status.st_size, max_bytes, real)
    except MediaError:
        file.close()
        raise
    return file


def check_bytes(size: int, max_bytes: float, name) -> None:
    if size == 0:
        raise MediaError("empty", f"expected an image or a video, got the empty file {short(name)}; copy it again")
    if size > max_bytes:
        raise MediaError(
            "too_large",
            f"expected at most {int(max_bytes)} bytes, got {size} in {short(name)}; shrink it or raise the limit in MediaLimits",
        )


def allow(kind: str, limits: MediaLimits, source) -> None:
    if kind not in limits.allow:
        raise MediaError(
            "refused",
            f"expected media from {' or '.join(limits.allow) or 'nowhere'}, got {short(source)}; MediaLimits.allow leaves out {kind!r}",
        )


def short(source) -> str:
    """A source for a message: paths in full up to 120 characters, anything else by its kind."""
    if isinstance(source, bytes | bytearray):
        return f"{len(source)} bytes"
    text = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else f"<{type(source).__name__}>"
    return text if len(text) <= 120 else f"{text[:60]}…{text[-50:]}"


def natural_key(name: str) -> tuple[list, str]:
    """Sorts frame2.png before frame10.png."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(_DIGITS.split(name))], name


# ---- images ----


@dataclass(frozen=True)
class StillImage:
    """An image that passed the header checks: `size` is (width, height); `load()` decodes it to RGB."""

    source: object
    size: tuple[int, int]
    limits: MediaLimits

    def load(self) -> Image.Image:
        with _opened(self.source, self.limits) as image:
            try:
                return image.convert("RGB")
            except _IMAGE_ERRORS as error:
                raise _broken_image(self.source, error) from None


def open_image(source, limits: MediaLimits) -> StillImage:
    """Checks an image by its header. `source`: a path, bytes of a file, a PIL image, or an (H, W, 3) uint8 array."""
    with _opened(source, limits) as image:
        return StillImage(source, image.size, limits)


@contextlib.contextmanager
def _opened(source, limits: MediaLimits) -> Iterator[Image.Image]:
    """The image behind a source, its pixels counted but not decoded; files are closed again, the caller's own images are not."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, Image.Image | np.ndarray):
            allow("memory", limits, source)
            image = source if isinstance(source, Image.Image) else Image.fromarray(_check_array(source))
        else:
            file = stack.enter_context(_image_file(source, limits))
            try:
                image = Image.open(file, formats=limits.image_formats)
            except _IMAGE_ERRORS as error:
                raise _broken_image(source, error) from None
        if not 0 < image.width * image.height <= limits.max_pixels:
            size = f"{image.width} × {image.height}"
            raise MediaError("too_large", f"expected 1 to {limits.max_pixels} pixels, got {size} in {short(source)}; shrink the image")
        yield image


def _check_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise MediaError("broken", f"expected an image as uint8 (height, width, 3), got {pixels.dtype} {pixels.shape}; convert it")
    return pixels


def _image_file(source, limits: MediaLimits) -> BinaryIO:
    if isinstance(source, bytes | bytearray):
        allow("memory", limits, source)
        check_bytes(len(source), limits.max_image_bytes, source)
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise MediaError("broken", f"expected a path, bytes, a PIL image or a uint8 array, got {type(source).__name__}; give one of these")
    real = resolve(source, limits)
    if os.path.isdir(real):
        raise MediaError("broken", f"expected an image file, got the directory {short(source)}; name a file in it")
    return open_file(real, limits.max_image_bytes)


def _broken_image(source, error: BaseException) -> MediaError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return MediaError("too_large", f"expected an image of reasonable size, got {short(source)}: {error}; shrink the image")
    reason = "truncated" if "truncated" in str(error) else "broken"
    return MediaError(
        reason, f"expected a whole image, got {short(source)}, which does not decode: {str(error)[:200]}; copy or convert it again"
    )


# ---- videos ----


class FrameVideo:
    """Frames that are there one by one: an array, a list, a directory. Counted as one frame per second."""

    fps = Fraction(1)

    def __init__(self, frames: Sequence, limits: MediaLimits):
        if len(frames) == 0:
            raise MediaError("empty", "expected a video with at least one frame, got none; check the directory or the list")
        if len(frames) > limits.max_decoded:
            raise MediaError("endless", f"expected at most {limits.max_decoded} frames, got {len(frames)}; leave some out")
        self.frames, self.limits, self.num_frames = frames, limits, len(frames)

    def read(self, indices: Sequence[int], tile: int) -> np.ndarray:
        """(F, S, S, 3) uint8: the frames at these indices, padded to squares and resized."""
        if isinstance(self.frames, np.ndarray) and self.frames.shape[1] == self.frames.shape[2] == tile:
            return self.frames[np.asarray(indices)]
        out = np.empty((len(indices), tile, tile, 3), dtype=np.uint8)
        for k, index in enumerate(indices):
            if k and index == indices[k - 1]:
                out[k] = out[k - 1]
                continue
            frame = self.frames[index]
            if not isinstance(self.frames, np.ndarray):
                frame = np.asarray(open_image(frame, self.limits).load())
            out[k] = square(frame, tile)
        return out


def check_frame(width: int, height: int, limits: MediaLimits, source) -> None:
    if width < 1 or height < 1:
        message = f"expected frames of 1 to {limits.max_frame_pixels} pixels, got {width} × {height} in {short(source)}"
        raise MediaError("broken", f"{message}; convert the video or copy it again")
    if width * height > limits.max_frame_pixels:
        raise MediaError(
            "too_large",
            f"expected frames of 1 to {limits.max_frame_pixels} pixels, got {width} × {height} in {short(source)}; scale it down",
        )


def check_length(seconds: float, frames: int, limits: MediaLimits, source) -> None:
    if seconds > limits.max_seconds:
        raise MediaError("endless", f"expected at most {limits.max_seconds:g} seconds, got {seconds:.0f} in {short(source)}; cut the video")
    if frames > limits.max_decoded:
        raise MediaError("endless", f"expected at most {limits.max_decoded} frames, got {frames} in {short(source)}; cut the video")


def open_video(source, limits: MediaLimits) -> "FrameVideo | FileVideo":
    """Checks a video by its header.

    `source`: a file, its bytes, a directory of frames (natural order), an (F, H, W, 3) uint8 array, or a list of what `open_image` takes.
    """
    if isinstance(source, np.ndarray):
        allow("memory", limits, source)
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3 or 0 in source.shape[1:3]:
            raise MediaError(
                "broken", f"expected a video as uint8 (frames, height, width, 3), got {source.dtype} {source.shape}; convert it"
            )
        check_frame(source.shape[2], source.shape[1], limits, source)
        return FrameVideo(source, limits)
    if isinstance(source, list | tuple):
        return FrameVideo(source, limits)
    if isinstance(source, bytes | bytearray):
        return _file_video(source, limits)
    if not isinstance(source, str | os.PathLike):
        raise MediaError(
            "broken", f"expected a path, bytes, a uint8 array or a list of frames, got {type(source).__name__}; give one of these"
        )
    real = resolve(source, limits)
    return FrameVideo(_frame_files(real, limits), limits) if os.path.isdir(real) else _file_video(real, limits)


def _file_video(source, limits: MediaLimits) -> "FileVideo":
    try:
        from longvita.data.video import FileVideo  # PyAV is an extra: text, images and frames work without it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('reading video files needs PyAV: pip install "longvita[video]"', name=error.name) from None
    return FileVideo(source, limits)


def _frame_files(directory: str, limits: MediaLimits) -> list[str]:
    names = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.lower().endswith(_FRAME_FILES):
                    names.append(entry.name)
                if len(names) > limits.max_decoded:
                    raise MediaError(
                        "endless", f"expected at most {limits.max_decoded} frames, got more in {short(directory)}; leave some out"
                    )
    except OSError as error:
        raise MediaError(
            "missing", f"expected a readable directory, got {short(directory)}: {error.strerror}; check its permissions"
        ) from None
    if not names:
        raise MediaError(
            "empty", f"expected image files ({', '.join(_FRAME_FILES)}) in {short(directory)}, got none; name the directory that holds them"
        )
    return [os.path.join(directory, name) for name in sorted(names, key=natural_key)]


def sample_frames(num_frames: int, fps: float, max_frames: int, max_fps: float = 1.0) -> list[int]:
    """Indices of at most `max_frames` frames, `max_fps` per second or evenly over the whole video: int(i * step) while inside."""
    step = max(float(fps) / max_fps, num_frames / (max_frames + 1))
    indices = [int(i * step) for i in range(max_frames)]
    return [index for index in indices if index < num_frames]
