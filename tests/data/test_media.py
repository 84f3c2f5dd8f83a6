"""Media from strangers: what is read, and how everything else is refused, in little memory. `python -m bench host` measures how quickly."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from bench import hostile
from bench.hostile import chunk, png_header
from longvita.data.media import MediaError, MediaLimits, natural_key, open_image, open_video, sample_frames
from tests.data.support import make_image, make_video

LIMITS = MediaLimits()


def refused(reason, says, call, *arguments):
    with pytest.raises(MediaError, match=says) as caught:
        call(*arguments)
    assert caught.value.reason == reason, caught.value
    assert "expected" in str(caught.value) and ", got " in str(caught.value) and "; " in str(caught.value)


def load(source, limits=LIMITS):
    return open_image(source, limits).load()


def read(source, limits=LIMITS):
    video = open_video(source, limits)
    return video.read(sample_frames(video.num_frames, video.fps, limits.max_frames), 16)


# ---- sampling ----


@pytest.mark.parametrize(
    "frames, fps, cap, want",
    [
        (10, 1, 100, list(range(10))),
        (60, 2, 100, list(range(0, 60, 2))),  # one per second
        (90, 29.97, 100, [0, 29, 59, 89]),
        (10, 1, 4, [0, 2, 4, 6]),  # every 10/5th
        (1000, 1, 512, [int(i * 1000 / 513) for i in range(512)]),  # spread over the whole, not the first 512
        (3, 0.5, 100, [0, 0, 1, 1, 2, 2]),  # half a frame per second: each stands for two seconds
        (1, 30, 1, [0]),
    ],
)
def test_sampled_frames(frames, fps, cap, want):
    assert sample_frames(frames, fps, cap) == want


def test_sampling_at_another_rate():
    assert sample_frames(20, 10, 100, max_fps=5) == list(range(0, 20, 2))


def test_natural_order():
    names = ["f10.png", "f2.png", "a", "f1b.png", "f01.png", "10", "9", "a1"]
    assert sorted(names, key=natural_key) == ["9", "10", "a", "a1", "f01.png", "f1b.png", "f2.png", "f10.png"]


# ---- images ----


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_images_of_every_format(tmp_path, suffix):
    image = load(make_image(tmp_path / f"x.{suffix}", (20, 10)))
    assert image.mode == "RGB" and image.size == (20, 10)
    assert np.abs(np.asarray(image, dtype=int) - (10, 200, 30)).max() <= 8


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    assert load(Image.new(mode, (4, 3))).mode == "RGB"


def test_images_from_memory_are_left_open(tmp_path):
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(np.asarray(load(pixels)), pixels)
    assert load(make_image(tmp_path / "x.png").read_bytes()).size == (64, 32)
    with Image.open(tmp_path / "x.png") as image:
        assert load(image).size == (64, 32) and load(image).getpixel((0, 0)) == (10, 200, 30)


def test_too_many_pixels_are_refused_by_the_header(tmp_path):
    bomb = png_header(60_000, 60_000) + chunk(b"IDAT", zlib.compress(bytes(2**20)))
    refused("too_large", "image of reasonable size", load, bomb)
    refused(
        "too_large", r"1 to 33554432 pixels, got 8000 × 8000 in 45 bytes", open_image, png_header(8000, 8000) + chunk(b"IDAT", b""), LIMITS
    )
    refused("too_large", "1 to 100 pixels, got 64 × 32", load, make_image(tmp_path / "x.png"), MediaLimits(max_pixels=100))
    refused("too_large", "1 to 100 pixels, got 11 × 10", load, np.zeros((10, 11, 3), np.uint8), MediaLimits(max_pixels=100))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_truncated_images(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"x.{suffix}")
    whole = (tmp_path / f"x.{suffix}").read_bytes()
    for keep in (len(whole) // 2, 30, 5):
        with pytest.raises(MediaError, match="expected a whole image") as caught:
            load(whole[:keep])
        assert caught.value.reason in ("truncated", "broken")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_flipped_byte_gives_an_image_or_a_media_error():
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpeg", "webp", "gif", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(buffer, suffix)
        for _ in range(100):
            data = bytearray(buffer.getvalue())
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(256)
            try:
                assert load(bytes(data)).mode == "RGB"
            except MediaError as error:
                assert error.reason in ("broken", "truncated", "too_large")


def test_things_that_are_no_images(tmp_path):
    (tmp_path / "empty.png").touch()
    refused("empty", "got the empty file .*empty.png", load, tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("hello")
    refused("broken", "does not decode", load, tmp_path / "text.png")
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refused("broken", "does not decode", load, tmp_path / "x.eps")
    refused("broken", "expected an image file, got the directory", load, tmp_path)
    refused("missing", "nothing.png.*No such file", load, tmp_path / "nothing.png")
    refused("missing", "File name too long", load, "x" * 5000)
    refused("broken", "got NoneType", load, None)
    refused("broken", r"uint8 \(height, width, 3\), got float64 \(2, 2, 3\)", load, np.zeros((2, 2, 3)))
    refused("broken", r"got uint8 \(2, 2\)", load, np.zeros((2, 2), np.uint8))
    refused("broken", r"got uint8 \(0, 2, 3\)", load, np.zeros((0, 2, 3), np.uint8))


def test_sparse_giants_are_refused_by_their_size(tmp_path):
    for name in ("giant.png", "giant.mp4"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**40)
    refused("too_large", "at most 67108864 bytes, got 1099511627776", load, tmp_path / "giant.png")
    refused("too_large", "at most 8589934592 bytes, got 1099511627776", read, tmp_path / "giant.mp4")
    with open(tmp_path / "giant.mp4", "wb") as file:
        file.truncate(2**32)  # allowed, but nothing in it
    refused("broken", "expected a video in one of the formats", read, tmp_path / "giant.mp4")


# ---- paths ----


@pytest.mark.parametrize(
    "path",
    [
        "http://example.org/x.png",
        "https://x/y.mp4",
        "file:///etc/passwd",
        "FILE:x.png",
        "ftp://x",
        "concat:a|b",
        "data:image/png;base64,AA",
    ],
)
@pytest.mark.parametrize("call", [load, read])
def test_urls_and_protocols_are_refused(path, call):
    refused("refused", "expected the path of a local file", call, path)


def test_paths_outside_the_root_are_refused(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    outside.mkdir()
    make_image(outside / "x.png")
    make_image(root / "x.png")
    make_video(outside / "x.mp4")
    limits = MediaLimits(root=str(root))
    (root / "link.png").symlink_to(outside / "x.png")
    (root / "link.mp4").symlink_to(outside / "x.mp4")
    (root / "folder").symlink_to(outside)
    (root / "inner.png").symlink_to(root / "x.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert load("x.png", limits).size == load(str(root / "x.png"), limits).size == load("inner.png", limits).size == (64, 32)
    for path in (
        "../secret/x.png",
        str(outside / "x.png"),
        "link.png",
        "folder/x.png",
        "/etc/passwd",
        "../root2/x.png",
        "../secret/nothing",
    ):
        refused("outside_root", "below the media root", load, path, limits)
    for path in ("link.mp4", "folder", "../secret"):
        refused("outside_root", "below the media root", read, path, limits)
    refused("missing", "loop.png", load, "loop.png", limits)
    frames = root / "frames"
    frames.mkdir()
    (frames / "0.png").symlink_to(outside / "x.png")
    refused("outside_root", "below the media root", read, "frames", limits)


def test_devices_and_pipes_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        refused("refused", "a device or a pipe", load, path)
        refused("refused", "a device or a pipe", read, path)
    refused("refused", "expected the path of a local file", load, "x\0.png")


def test_kinds_of_sources_can_be_left_out(tmp_path):
    make_image(tmp_path / "x.png")
    no_paths, no_memory = MediaLimits(allow=("memory",)), MediaLimits(allow=("path",))
    refused("refused", "media from memory, got .*; MediaLimits.allow leaves out 'path'", load, tmp_path / "x.png", no_paths)
    for source in (b"x", np.zeros((2, 2, 3), np.uint8), Image.new("RGB", (2, 2))):
        refused("refused", "leaves out 'memory'", load, source, no_memory)
    refused("refused", "leaves out 'memory'", read, np.zeros((2, 2, 2, 3), np.uint8), no_memory)
    refused("refused", "leaves out 'memory'", read, b"x", no_memory)


def test_limits_check_themselves(tmp_path):
    with pytest.raises(ValueError, match="MediaLimits.max_pixels must be a positive number, got 0"):
        MediaLimits(max_pixels=0)
    with pytest.raises(ValueError, match="MediaLimits.allow knows path, memory, got .*url"):
        MediaLimits(allow=("url",))
    with pytest.raises(ValueError, match="MediaLimits.image_formats must be a list of names, got 'PNG'"):
        MediaLimits(image_formats="PNG")
    with pytest.raises(ValueError, match="MediaLimits.root must be an existing directory"):
        MediaLimits(root=str(tmp_path / "nothing"))


# ---- videos ----


@pytest.mark.parametrize(
    "name, codec", [("x.mp4", "mpeg4"), ("x.mp4", "h264"), ("x.mkv", "mpeg4"), ("x.avi", "mpeg4"), ("x.webm", "libvpx")]
)
def test_videos_of_every_format(tmp_path, name, codec):
    video = open_video(make_video(tmp_path / name, codec=codec), LIMITS)
    assert (video.num_frames, video.fps) == (12, 2)
    frames = video.read([0, 5, 11], 16)
    assert frames.shape == (3, 16, 16, 3) and frames.dtype == np.uint8
    middle = frames[:, 8, 8].astype(int)  # the bars above and below are padding
    assert np.abs(middle - [[0], [100], [220]]).max() <= 12
    assert np.abs(frames[:, 0, 8].astype(int) - (123, 116, 103)).max() <= 8


def test_frames_are_picked_by_their_number(tmp_path):
    video = open_video(make_video(tmp_path / "x.mp4", frames=12, size=(16, 16)), LIMITS)
    for wanted in ([0], [11], [0, 0, 1, 1], [3, 7], list(range(12))):
        levels = video.read(wanted, 16).mean(axis=(1, 2, 3))
        assert np.abs(levels - 20 * np.array(wanted)).max() <= 8


def test_video_from_bytes(tmp_path):
    data = make_video(tmp_path / "x.mp4").read_bytes()
    assert read(data).shape == (6, 16, 16, 3)


def test_arrays_lists_and_directories_are_one_frame_per_second(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(read(frames), frames)
    assert np.array_equal(read(list(frames)), frames)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert np.array_equal(read(tmp_path), frames), "natural order: 2 before 10"
    assert np.array_equal(read([str(tmp_path / "3.png"), frames[4], Image.fromarray(frames[5])]), frames[3:6])
    assert np.array_equal(read(frames, MediaLimits(max_frames=4)), frames[[0, 2, 4, 6]])
    for source in (frames, list(frames)):
        assert np.array_equal(open_video(source, MediaLimits(max_decoded=11)).read([2, 2, 3], 16), frames[[2, 2, 3]])
    assert read(np.zeros((3, 8, 12, 3), np.uint8)).shape == (3, 16, 16, 3)


def test_a_large_directory_is_spread_over_the_whole(tmp_path):
    frames = np.zeros((1000, 1, 1, 3), np.uint8)
    video = open_video(frames, LIMITS)
    indices = sample_frames(video.num_frames, video.fps, 512)
    assert len(indices) == 512 and indices[-1] > 990


def test_empty_videos(tmp_path):
    (tmp_path / "empty.mp4").touch()
    refused("empty", "got the empty file", read, tmp_path / "empty.mp4")
    (tmp_path / "folder").mkdir()
    refused("empty", r"expected image files \(.jpg, .*got none", read, tmp_path / "folder")
    refused("empty", "at least one frame, got none", read, [])
    refused("empty", "at least one frame, got none", read, np.zeros((0, 4, 4, 3), np.uint8))
    make_sound(tmp_path / "sound.mp4")
    refused("empty", "expected a video stream, got none", read, tmp_path / "sound.mp4")
    refused("broken", r"uint8 \(frames, height, width, 3\), got float32 \(1, 2, 2, 3\)", read, np.zeros((1, 2, 2, 3), np.float32))
    refused("broken", "got int", read, 7)


def make_sound(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_mislabelled_videos(tmp_path):
    make_image(tmp_path / "x.png")
    (tmp_path / "image.mp4").write_bytes((tmp_path / "x.png").read_bytes())
    (tmp_path / "text.mp4").write_text("hello " * 1000)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(100_000))
    for name in ("image.mp4", "text.mp4", "noise.mp4", "x.png"):
        refused("broken", "expected a video in one of the formats mov, matroska, avi", read, tmp_path / name)


def test_playlists_open_no_other_file(tmp_path):
    target = make_video(tmp_path / "x.mp4")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n"
    for name, text in (("x.m3u8", playlist), ("list.mp4", playlist), ("x.ffconcat", f"ffconcat version 1.0\nfile {target}\n")):
        (tmp_path / name).write_text(text)
        refused("broken", "expected a video in one of the formats", read, tmp_path / name)


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.avi"])
def test_truncated_videos(tmp_path, name):
    options = {"options": {"movflags": "faststart"}} if name == "x.mp4" else {}
    data = make_video(tmp_path / name, frames=100, fps=1, size=(64, 64), **options).read_bytes()
    assert len(read(data)) == 100
    refused(
        "truncated",
        r"expected 100 (frames|seconds) of \d+ bytes, got \d\d before its end; copy the file again",
        read,
        data[: len(data) * 2 // 3],
    )
    with pytest.raises(MediaError, match="expected a video"):
        read(data[:40])


def test_a_movie_without_its_index_is_broken(tmp_path):
    data = make_video(tmp_path / "x.mp4", frames=100, fps=1).read_bytes()  # the index comes last
    refused("broken", "expected a video", read, data[: len(data) * 2 // 3])


def test_a_frame_or_two_less_than_promised_is_no_error(tmp_path):
    video = open_video(make_video(tmp_path / "x.mp4", frames=12, fps=1, size=(16, 16)), LIMITS)
    levels = video.read([10, 11, 12], 16).mean(axis=(1, 2, 3))  # as if the header had said 13
    assert np.abs(levels - [200, 220, 220]).max() <= 8
    with pytest.raises(MediaError, match="expected 15 frames of .*, got 12 before its end"):
        video.read([10, 11, 12, 14], 16)


def test_one_wanted_frame_far_behind_the_end_is_a_cut_file(tmp_path):
    video = open_video(make_video(tmp_path / "x.mp4", frames=12, fps=1, size=(16, 16)), LIMITS)
    video.num_frames = 1001  # as if the header had said so
    with pytest.raises(MediaError, match="expected 1001 frames of .*, got 12 before its end") as caught:
        video.read([0, 1000], 16)
    assert caught.value.reason == "truncated"


def test_endless_videos_are_refused_by_their_length(tmp_path):
    path = make_video(tmp_path / "x.mp4", frames=40, fps=2, size=(16, 16))
    refused("endless", "at most 10 seconds, got 20", read, path, MediaLimits(max_seconds=10))
    refused("endless", "at most 39 frames, got 40", read, path, MediaLimits(max_decoded=39))
    refused("endless", "at most 0.5 seconds, got 20", read, path, MediaLimits(max_seconds=0.5))
    assert len(read(path, MediaLimits(max_seconds=20, max_decoded=40))) == 20
    stream = make_video(tmp_path / "x.mkv", frames=40, fps=2, size=(16, 16))
    refused("endless", "at most 10 seconds, got", read, stream, MediaLimits(max_seconds=10))
    refused("endless", "at most 39 frames, got 40", read, stream, MediaLimits(max_decoded=39))
    refused("endless", "at most 3 frames", read, np.zeros((4, 2, 2, 3), np.uint8), MediaLimits(max_decoded=3))
    for i in range(4):
        make_image(tmp_path / f"{i}.png", (2, 2))
    refused("endless", "at most 3 frames, got more", read, tmp_path, MediaLimits(max_decoded=3))


def test_a_header_that_promises_too_much(tmp_path):
    """Frames that each last two days: refused before one is decoded."""
    data = bytearray(make_video(tmp_path / "x.mp4").read_bytes())
    struct.pack_into(">I", data, data.index(b"stts") + 16, 2**31 - 1)
    refused("endless", "at most 21600 seconds", read, bytes(data))


def test_large_frames_and_strange_codecs_are_refused(tmp_path):
    path = make_video(tmp_path / "x.mp4", size=(64, 48))
    refused("too_large", "frames of 1 to 1000 pixels, got 64 × 48", read, path, MediaLimits(max_frame_pixels=1000))
    refused("too_large", "frames of 1 to 10 pixels, got 4 × 4", read, np.zeros((1, 4, 4, 3), np.uint8), MediaLimits(max_frame_pixels=10))
    refused("refused", "a codec out of h264, got mpeg4", read, path, MediaLimits(video_codecs=("h264",)))


def test_every_flipped_byte_gives_frames_or_a_media_error(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("x.mp4", "x.mkv", "x.avi"):
        whole = make_video(tmp_path / name, frames=5, size=(16, 16)).read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            try:
                assert read(bytes(data)).shape[1:] == (16, 16, 3)
            except MediaError as error:
                assert error.reason in ("broken", "truncated", "too_large", "endless", "empty", "refused")


def test_files_are_closed_again(tmp_path):
    import gc
    import warnings

    make_image(tmp_path / "x.png")
    make_video(tmp_path / "x.mp4")
    (tmp_path / "bad.mp4").write_text("x")
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        load(tmp_path / "x.png")
        read(tmp_path / "x.mp4")
        with pytest.raises(MediaError, match="expected a video"):
            read(tmp_path / "bad.mp4")
        with pytest.raises(MediaError, match="does not decode"):
            load(tmp_path / "bad.mp4")
        gc.collect()
    assert [str(warning.message) for warning in caught if warning.category is ResourceWarning] == []


HOSTILE = """
import resource, sys
sys.path.insert(0, {root!r})
from longvita.data.media import MediaError, MediaLimits, open_image, open_video, sample_frames
import longvita.data.video
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
for path in sys.argv[1:]:
    try:
        if path.endswith(".png") or path.endswith(".jpg"):
            open_image(path, MediaLimits()).load()
        else:
            video = open_video(path, MediaLimits())
            video.read(sample_frames(video.num_frames, video.fps, 64), 16)
        print("accepted", path)
    except MediaError as error:
        print(error.reason, f"{{peak() - before:.0f}}")
"""


def test_hostile_files_are_refused_in_little_memory(tmp_path):
    hostile.write(tmp_path)
    paths = [str(tmp_path / name) for name in hostile.REASONS]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    run = subprocess.run([sys.executable, "-c", HOSTILE.format(root=root), *paths], capture_output=True, text=True, timeout=500, check=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [line[0] for line in lines] == list(hostile.REASONS.values()), run.stdout
    assert all(float(megabytes) < 200 for _, megabytes in lines), run.stdout
