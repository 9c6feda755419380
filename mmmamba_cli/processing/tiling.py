"""Tiling of images into squares, as in InternVL's dynamic preprocessing.

Legend: N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmmamba_cli.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Sizes of pictures whose numbers of tiles are kept; a data set has many pictures of a size.
MAX_CACHED_SIZES = 1 << 14


@dataclass(frozen=True)
class Tiling:
    """Settings of tiling. `image_size` is S; `max_tiles` does not count the thumbnail."""

    image_size: int
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise DataError(f"image_size is {self.image_size}, expected at least 1")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise DataError(
                f"min_tiles is {self.min_tiles} and max_tiles {self.max_tiles}, "
                "expected 1 <= min_tiles <= max_tiles"
            )


@lru_cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids (columns, rows) of allowed size, by area, then by columns."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def choose_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is closest to width / height.

    Of equally close grids, the larger is chosen if the image has more than half its pixels.
    Differences are compared as floats, as in the code of the published models.
    """
    aspect, area = width / height, width * height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _grids(tiling.min_tiles, tiling.max_tiles):
        difference = abs(aspect - columns / rows)
        half = 0.5 * tiling.image_size * tiling.image_size * columns * rows
        if difference < best_difference or (difference == best_difference and area > half):
            best, best_difference = (columns, rows), difference
    return best


@lru_cache(MAX_CACHED_SIZES)
def count_tiles(width: int, height: int, tiling: Tiling) -> int:
    """Number of tiles of an image of that size in pixels, including the thumbnail."""
    columns, rows = choose_grid(width, height, tiling)
    cells = columns * rows
    return cells + 1 if tiling.use_thumbnail and cells > 1 else cells


def cut_tiles(image: Image.Image, tiling: Tiling) -> list[Image.Image]:
    """Cut an image into S x S tiles, row by row; the thumbnail follows if there are several.

    The image is first resized (bicubic) to the grid, which may change its aspect ratio.
    """
    size = tiling.image_size
    columns, rows = choose_grid(*image.size, tiling)
    resized = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        for row in range(rows)
        for column in range(columns)
    ]
    if tiling.use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


def stack_tiles(tiles: Sequence[Image.Image]) -> Tensor:
    """Stack RGB tiles as (N, 3, S, S) uint8."""
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))
    return pixels.permute(0, 3, 1, 2).contiguous()


def normalize(pixels: Tensor) -> Tensor:
    """Normalise uint8 (N, 3, S, S) by ImageNet's mean and deviation; float32, same device."""
    # Tensors, since CUDA divides by a Python number by multiplying with its inverse: other bits.
    full, mean, deviation = (
        torch.tensor(values).view(-1, 1, 1).to(pixels.device, non_blocking=True)
        for values in ((255.0,), IMAGENET_MEAN, IMAGENET_STD)
    )
    return pixels.float().div_(full).sub_(mean).div_(deviation)
