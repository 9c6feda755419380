"""Tiling: grids against a table and a brute-force reference, tiles against single pixels."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import Tiling, choose_grid, count_tiles
from mmmamba_cli.processing.tiling import cut_tiles, normalize, stack_tiles

# width, height, most tiles -> columns, rows, tiles with thumbnail. Worked out by hand for tiles of
# 448: half of 2 x 2 tiles is 401408 pixels, of 3 x 2 602112, of 3 x 3 903168, of 6 x 2 1204224.
TABLE = [
    (448, 448, 12, 1, 1, 1),
    (633, 633, 12, 1, 1, 1),
    (634, 634, 12, 2, 2, 5),
    (900, 900, 12, 2, 2, 5),
    (1000, 1000, 12, 3, 3, 10),
    (1000, 1000, 6, 2, 2, 5),
    (4000, 4000, 1, 1, 1, 1),
    (800, 600, 12, 4, 3, 13),
    (800, 600, 6, 3, 2, 7),
    (600, 800, 6, 2, 3, 7),
    (1344, 448, 12, 3, 1, 4),
    (2688, 896, 12, 6, 2, 13),
    (100, 2000, 12, 1, 12, 13),
    (100, 2000, 6, 1, 6, 7),
    (5000, 1, 6, 6, 1, 7),
    # 1.25 lies exactly between 1 and 1.5.
    (500, 400, 6, 1, 1, 1),
    (750, 600, 6, 2, 2, 5),
    (1250, 1000, 6, 3, 2, 7),
    (1, 1, 12, 1, 1, 1),
]


@pytest.mark.parametrize(("width", "height", "most", "columns", "rows", "tiles"), TABLE)
def test_table(width: int, height: int, most: int, columns: int, rows: int, tiles: int) -> None:
    tiling = Tiling(image_size=448, max_tiles=most)
    assert choose_grid(width, height, tiling) == (columns, rows)
    assert count_tiles(width, height, tiling) == tiles
    assert count_tiles(width, height, Tiling(448, 1, most, use_thumbnail=False)) == columns * rows


def oracle(width: int, height: int, tiling: Tiling, turned: bool) -> tuple[int, int]:
    """Reference: the last of the closest grids covered by half, else the first."""
    sides = range(1, tiling.max_tiles + 1)
    grids = [
        grid
        for grid in itertools.product(sides, sides)
        if tiling.min_tiles <= grid[0] * grid[1] <= tiling.max_tiles
    ]
    grids.sort(key=lambda grid: (grid[0] * grid[1], -grid[0] if turned else grid[0]))
    distance = {grid: abs(width / height - grid[0] / grid[1]) for grid in grids}
    closest = [grid for grid in grids if distance[grid] == min(distance.values())]
    covered = [
        grid
        for grid in closest[1:]
        if 2 * width * height > tiling.image_size**2 * grid[0] * grid[1]
    ]
    return (covered or closest[:1])[-1]


sizes = st.integers(1, 3000)


@given(sizes, sizes, st.integers(1, 12), st.integers(0, 24), st.sampled_from([28, 112, 448]))
def test_oracle(width: int, height: int, least: int, more: int, size: int) -> None:
    tiling = Tiling(image_size=size, min_tiles=least, max_tiles=least + more)
    assert choose_grid(width, height, tiling) == oracle(width, height, tiling, turned=False)


@pytest.mark.parametrize("most", range(1, 41))
def test_grids_of_equal_area_never_tie_from_one_tile_on(most: int) -> None:
    """Their order, which is that of a set in published code, does not matter."""
    tiling = Tiling(image_size=28, max_tiles=most)
    ratios = sorted({Fraction(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)})
    for low, high in itertools.pairwise(ratios):
        middle = (low + high) / 2
        # Small and large images with an aspect ratio half-way between two grids.
        for scale in (1, 1000):
            width, height = middle.numerator * scale, middle.denominator * scale
            expected = oracle(width, height, tiling, turned=True)
            assert choose_grid(width, height, tiling) == expected


def test_ties_of_equal_area_take_the_fewest_columns() -> None:
    assert choose_grid(125, 100, Tiling(image_size=448, min_tiles=2, max_tiles=2)) == (1, 2)
    assert choose_grid(1250, 1000, Tiling(image_size=448, min_tiles=2, max_tiles=2)) == (2, 1)


@pytest.mark.parametrize(("least", "most"), [(0, 3), (4, 3), (-1, -1)])
def test_impossible_numbers_of_tiles(least: int, most: int) -> None:
    with pytest.raises(DataError, match=f"min_tiles is {least} and max_tiles {most}"):
        Tiling(image_size=448, min_tiles=least, max_tiles=most)


def test_impossible_size() -> None:
    with pytest.raises(DataError, match="image_size is 0"):
        Tiling(image_size=0)


def test_tiles_go_row_by_row_and_the_thumbnail_comes_last() -> None:
    colours = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    picture = Image.fromarray(np.kron(colours, np.ones((8, 8), np.uint8))).convert("RGB")
    tiles = cut_tiles(picture, Tiling(image_size=8, max_tiles=6))
    assert [tile.size for tile in tiles] == [(8, 8)] * 7
    assert [np.unique(np.asarray(tile)).tolist() for tile in tiles[:6]] == [
        [v] for v in range(0, 240, 40)
    ]
    assert tiles[6].tobytes() == picture.resize((8, 8), Image.Resampling.BICUBIC).tobytes()


def test_one_tile_is_the_resized_picture_without_thumbnail() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8))
    (tile,) = cut_tiles(picture, Tiling(image_size=8, max_tiles=1))
    assert tile.tobytes() == picture.resize((8, 8), Image.Resampling.BICUBIC).tobytes()
    assert tile.tobytes() != picture.resize((8, 8), Image.Resampling.BILINEAR).tobytes()


def test_no_thumbnail_if_it_is_off() -> None:
    picture = Image.new("RGB", (16, 8))
    assert len(cut_tiles(picture, Tiling(image_size=8, max_tiles=2, use_thumbnail=False))) == 2


def test_normalisation() -> None:
    tile = Image.new("RGB", (2, 2), (0, 128, 255))
    tile.putpixel((1, 0), (255, 0, 0))
    values = normalize(stack_tiles([tile, tile]))
    assert (values.shape, values.dtype) == ((2, 3, 2, 2), torch.float32)
    expected = torch.tensor([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, 0.594 / 0.225])
    torch.testing.assert_close(values[1, :, 0, 0], expected, rtol=0, atol=1e-6)
    # Rows and columns are not swapped.
    assert values[0, 0, 0, 1] == pytest.approx((1 - 0.485) / 0.229, abs=1e-6)
    assert values[0, 0, 1, 0] == pytest.approx((0 - 0.485) / 0.229, abs=1e-6)
