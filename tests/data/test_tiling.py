"""The grid for an image, the order of its tiles, padding and normalisation."""

import numpy as np
import pytest
from PIL import Image

from longvita.data.tiling import MEAN, PADDING, STD, candidate_grids, choose_grid, count_tiles, cut, normalise, square

# (width, height) → (columns, rows), worked out by hand from the rule for 448-pixel tiles and up to 12 of them
GRIDS = [
    ((448, 448), (1, 1)),  # 1×1, 2×2 and 3×3 tie; the area is not above half of 2×2 tiles
    ((100, 100), (1, 1)),
    ((634, 634), (2, 2)),  # 401,956 pixels: above 0.5 · 448² · 4 = 401,408
    ((633, 633), (1, 1)),  # 400,689: below
    ((1000, 1000), (3, 3)),  # above 0.5 · 448² · 9 = 903,168
    ((800, 600), (4, 3)),  # 4/3 exactly
    ((1920, 1080), (4, 2)),  # 1.778: 2/1 is nearest (off by .222; 3/2 by .278), and the area is above half of 4 × 2 tiles
    ((300, 400), (3, 4)),
    ((4480, 448), (10, 1)),
    ((448, 5376), (1, 12)),
    ((10000, 10), (12, 1)),
    ((10, 10000), (1, 12)),
    ((896, 448), (2, 1)),  # ties with 4/2: 401,408 pixels are not above half of 8 tiles (802,816)
    ((1300, 650), (4, 2)),  # 845,000 are
]


@pytest.mark.parametrize("size, grid", GRIDS)
def test_grids_of_several_shapes(size, grid):
    assert choose_grid(*size, 448, 12) == grid


def test_candidates_are_all_grids_by_tile_count():
    grids = candidate_grids(12)
    assert len(grids) == len(set(grids)) == 35  # sum of divisor counts of 1 … 12
    counts = [i * j for i, j in grids]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 12
    with pytest.raises(ValueError, match="max_tiles must be at least 1, got 0"):
        candidate_grids(0)


def test_max_tiles_one_never_splits():
    assert choose_grid(4000, 100, 448, 1) == (1, 1)


def test_thumbnail_first_then_rows_of_tiles():
    picture = np.zeros((64, 96, 3), dtype=np.uint8)  # 3 columns × 2 rows of 32 pixels, tile k filled with 40 · k
    for k in range(6):
        picture[k // 3 * 32 : k // 3 * 32 + 32, k % 3 * 32 : k % 3 * 32 + 32] = 40 * k
    image = Image.fromarray(picture)
    tiles = cut(image, (3, 2), 32)
    assert tiles.shape == (7, 32, 32, 3) and tiles.dtype == np.uint8
    assert np.array_equal(tiles[0], np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))
    assert [int(tile.min()) for tile in tiles[1:]] == [int(tile.max()) for tile in tiles[1:]] == [0, 40, 80, 120, 160, 200]


def test_a_single_tile_is_stretched_and_has_no_thumbnail():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 50, 3), dtype=np.uint8))
    tiles = cut(image, (1, 1), 32)
    assert np.array_equal(tiles[0], np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))) and len(tiles) == 1


def test_counts_match_what_is_cut():
    image = Image.new("RGB", (40, 30))
    for grid in candidate_grids(6):
        assert len(cut(image, grid, 8)) == count_tiles(grid)


def test_tiles_are_cut_from_a_bicubic_resize_of_the_whole():
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (45, 70, 3), dtype=np.uint8))
    whole = np.asarray(image.resize((64, 32), Image.Resampling.BICUBIC))
    tiles = cut(image, (2, 1), 32)
    assert np.array_equal(np.concatenate([tiles[1], tiles[2]], axis=1), whole)


def test_frames_are_padded_with_the_mean_and_centred():
    assert PADDING == (123, 116, 103)
    wide = np.full((16, 32, 3), 255, dtype=np.uint8)
    out = square(wide, 32)
    assert out.shape == (32, 32, 3)
    assert (out[:8] == PADDING).all() and (out[24:] == PADDING).all() and (out[8:24] == 255).all()
    tall = square(wide.swapaxes(0, 1), 32)
    assert np.array_equal(tall, out.swapaxes(0, 1))
    odd = square(np.full((31, 32, 3), 255, dtype=np.uint8), 32)  # one spare row: it goes below
    assert (odd[:31] == 255).all() and (odd[31] == PADDING).all()
    exact = np.zeros((32, 32, 3), dtype=np.uint8)
    assert square(exact, 32) is exact
    large = np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    canvas = np.empty((60, 60, 3), dtype=np.uint8)
    canvas[:] = PADDING
    canvas[10:50] = large
    assert np.array_equal(square(large, 32), np.asarray(Image.fromarray(canvas).resize((32, 32), Image.Resampling.BICUBIC)))


def test_normalisation_is_the_published_formula():
    tiles = np.random.default_rng(3).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    out = np.empty((2, 3, 5, 5), dtype=np.float32)
    normalise(tiles, out)
    want = (tiles.astype(np.float64) / 255 - MEAN) / STD
    assert np.abs(out - want.transpose(0, 3, 1, 2)).max() < 1e-6
