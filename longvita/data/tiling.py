"""An image as a grid of square tiles: the grid whose shape comes closest to the image's, filled without keeping the aspect ratio.

Rule (InternVL's dynamic preprocessing, as Long-VITA was trained with): candidate grids (columns, rows) of up to 12 tiles, sorted by tile
count; the closest aspect ratio wins; on a tie the later grid wins when the image's area is above half of the grid's. More than one tile
brings a thumbnail, which comes first. Shapes: N tiles, S pixels per side.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

MEAN = (0.485, 0.456, 0.406)  # ImageNet, per channel of RGB in 0…1
STD = (0.229, 0.224, 0.225)
PADDING = tuple(int(255 * mean) for mean in MEAN)  # colour beside a frame that is no square


@lru_cache
def candidate_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of at most `max_tiles` tiles, by tile count, then columns."""
    if max_tiles < 1:
        raise ValueError(f"max_tiles must be at least 1, got {max_tiles}")
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles // i + 1)]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def choose_grid(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) for an image of width × height pixels and tiles of `tile` pixels."""
    ratio, best, smallest = width / height, (1, 1), float("inf")
    for columns, rows in candidate_grids(max_tiles):
        difference = abs(ratio - columns / rows)
        tie = difference == smallest and width * height > 0.5 * tile * tile * columns * rows
        if difference < smallest or tie:
            best, smallest = (columns, rows), difference
    return best


def count_tiles(grid: tuple[int, int]) -> int:
    """Tiles of a grid with its thumbnail."""
    tiles = grid[0] * grid[1]
    return tiles if tiles == 1 else tiles + 1


def cut(image: Image.Image, grid: tuple[int, int], tile: int) -> np.ndarray:
    """(N, S, S, 3) uint8: the thumbnail if there are several tiles, then the tiles row by row. `image` is RGB."""
    columns, rows = grid
    pixels = np.asarray(_resize(image, columns * tile, rows * tile))
    tiles = pixels.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    if columns * rows == 1:
        return tiles
    return np.concatenate([np.asarray(_resize(image, tile, tile))[None], tiles])


def square(frame_HW3: np.ndarray, tile: int) -> np.ndarray:
    """(S, S, 3) uint8: a video frame, padded to a centred square with the mean colour, then resized."""
    height, width = frame_HW3.shape[:2]
    if height == width == tile:
        return frame_HW3
    if height != width:
        side = max(height, width)
        canvas = np.empty((side, side, 3), dtype=np.uint8)
        canvas[:] = PADDING
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top : top + height, left : left + width] = frame_HW3
        frame_HW3 = canvas
    return np.asarray(_resize(Image.fromarray(frame_HW3), tile, tile))


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def _normalisation_table() -> np.ndarray:
    levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    return ((levels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).T.copy()


_TABLE_3L = _normalisation_table()


def normalise(tiles_NSS3: np.ndarray, out_N3SS: np.ndarray) -> None:
    """Writes (x / 255 - mean) / std of uint8 tiles into a float32 array, channels first: a look-up, as there are only 256 levels."""
    for channel in range(3):
        np.take(_TABLE_3L[channel], tiles_NSS3[..., channel], out=out_N3SS[:, channel], mode="clip")
