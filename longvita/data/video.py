"""Video files through PyAV: measured by their header, decoded frame by frame, never held whole. Shapes: F frames, S pixels per side."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np

from longvita.data.media import MediaError, MediaLimits, allow, check_bytes, check_frame, check_length, open_file, resolve, short
from longvita.data.tiling import square

_VIDEO_ERRORS = (av.FFmpegError, OSError, ValueError, EOFError, MemoryError, OverflowError, ZeroDivisionError)


class FileVideo:
    """A video file (its path or bytes), decoded from the start; only the wanted frames are kept, already resized."""

    def __init__(self, source, limits: MediaLimits):
        self.source, self.limits = source, limits
        with self._open() as container:
            self.num_frames, self.fps = _measure(container, limits, source)

    def read(self, indices: Sequence[int], tile: int) -> np.ndarray:
        """(F, S, S, 3) uint8: the frames at these ascending indices, padded to squares and resized."""
        out = np.empty((len(indices), tile, tile, 3), dtype=np.uint8)
        taken, last = 0, -1
        with self._open() as container:
            for last, frame in enumerate(container.decode(container.streams.video[0])):
                check_frame(frame.width, frame.height, self.limits, self.source)
                repeats = indices.count(last) if last == indices[taken] else 0  # below max_fps a frame stands for several
                if repeats:
                    out[taken : taken + repeats] = square(frame.to_ndarray(format="rgb24"), tile)
                    taken += repeats
                if taken == len(indices):
                    return out
        # Headers may promise a frame or two more than an edit list shows; more than that is a file cut short.
        if taken == 0 or indices[-1] - last > max(2, self.num_frames // 50):
            message = f"expected {indices[-1] + 1} frames of {short(self.source)}, got {last + 1} before its end; copy the file again"
            raise MediaError("truncated", message)
        out[taken:] = out[taken - 1]
        return out

    @contextlib.contextmanager
    def _open(self) -> Iterator["av.container.InputContainer"]:
        limits = self.limits
        if isinstance(self.source, bytes | bytearray):
            allow("memory", limits, self.source)
            check_bytes(len(self.source), limits.max_bytes, self.source)
            file = io.BytesIO(self.source)
        else:
            file = open_file(resolve(self.source, limits), limits.max_bytes)
        # Playlists and concatenations would make FFmpeg open other files and addresses: only plain containers, and no protocol at all.
        options = {
            "format_whitelist": ",".join(limits.video_formats),
            "protocol_whitelist": "none",
            "max_pixels": str(4 * limits.max_frame_pixels),  # FFmpeg calls a larger frame 0 × 0: what is near the limit keeps its size
        }
        try:
            with file, av.open(file, options=options) as container:
                yield container
        except MediaError:
            raise
        except _VIDEO_ERRORS as error:
            formats = ", ".join(limits.video_formats)
            message = f"expected a video in one of the formats {formats}, got {short(self.source)}: {str(error)[:200]}"
            raise MediaError("broken", f"{message}; copy or convert it again") from None


def _measure(container, limits: MediaLimits, source) -> tuple[int, Fraction]:
    """(frames, frames per second) by the header, or by counting packets where the header does not say."""
    if not container.streams.video:
        raise MediaError("empty", f"expected a video stream, got none in {short(source)}; is it a sound file?")
    stream = container.streams.video[0]
    context = stream.codec_context
    codec = context.codec.canonical_name if context is not None else "an unknown one"
    if codec not in limits.video_codecs:
        message = f"expected a codec out of {', '.join(limits.video_codecs)}, got {codec} in {short(source)}; convert the video"
        raise MediaError("refused", message)
    check_frame(context.width, context.height, limits, source)
    fps = stream.average_rate or stream.guessed_rate or stream.base_rate
    if not fps or fps <= 0:
        raise MediaError("broken", f"expected a frame rate, got none in {short(source)}; convert the video")
    seconds = max((container.duration or 0) / av.time_base, float((stream.duration or 0) * (stream.time_base or 0)))
    check_length(seconds, stream.frames, limits, source)
    frames = stream.frames or _count_packets(container, stream, limits, source)
    check_length(frames / float(fps), frames, limits, source)
    if frames < 1:
        raise MediaError("empty", f"expected a video with at least one frame, got none in {short(source)}; copy the file again")
    return frames, Fraction(fps)


def _count_packets(container, stream, limits: MediaLimits, source) -> int:
    """Frames of a container that does not say how many it has: reads all packets, decodes nothing."""
    count, end = 0, 0.0
    for packet in container.demux():
        count += packet.size > 0 and packet.stream_index == stream.index
        end = max(end, float(((packet.pts or 0) + (packet.duration or 0)) * (packet.time_base or 0)))
        check_length(end, count, limits, source)
    promised = (container.duration or 0) / av.time_base
    if end < 0.9 * promised - 1:
        message = f"expected {promised:.0f} seconds of {short(source)}, got {end:.0f} before its end; copy the file again"
        raise MediaError("truncated", message)
    return count
