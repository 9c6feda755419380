"""Tiles of pictures among the columns of a call, and taps of a convolution inside each tile.

Legend: B batch, T columns, N tiles, g columns along one side of a tile, Ch channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.ops.backends import upcast


def tile_columns(is_image: Tensor, num_tiles: int, side: int) -> Tensor:
    """The columns of each tile, (N, g, g) int64, flat indices into the (B * T) columns.

    `is_image` (B, T) bool is True at the image columns, which lie tile by tile, row by row of the
    grid. `num_tiles` is known on the host, so the shape needs no synchronization with a GPU.
    """
    images_first = (~is_image).flatten().byte().argsort(stable=True)
    return images_first[: num_tiles * side**2].view(num_tiles, side, side)


def tiles_in_chunk(tiles: Tensor, length: int, start: int, stop: int) -> Tensor:
    """The tiles (N, g, g) within columns `start` to `stop` of T, as indices into the chunk.

    Raises:
        ValueError: the chunk cuts a tile.
    """
    row, column = tiles // length, tiles % length
    first, last = column[:, 0, 0], column[:, -1, -1]
    inside = (first >= start) & (last < stop)
    if not bool((inside | (last < start) | (first >= stop)).all()):
        raise ValueError(f"a chunk of columns {start} to {stop} cuts a tile")
    return (row * (stop - start) + column - start)[inside]


def uncut_columns(tiles: Tensor, length: int) -> list[tuple[int, int]]:
    """Ranges of columns that no chunk may cut, each as its begin and end, in ascending order.

    Tiles of several rows that overlap are one range, since a chunk has the same columns of all
    rows.
    """
    column = tiles % length
    spans = torch.stack((column[:, 0, 0], column[:, -1, -1] + 1), dim=1)
    found: list[tuple[int, int]] = []
    for begin, end in sorted(map(tuple, spans.tolist())):
        if found and begin < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def split_columns(length: int, size: int, uncut: list[tuple[int, int]]) -> list[slice]:
    """Chunks of up to `size` of `length` columns; a cut in one of `uncut` moves to its begin.

    Raises:
        DataError: one of `uncut` has more than `size` columns.
    """
    needed = max((end - begin for begin, end in uncut), default=0)
    if needed > size:
        raise DataError(
            f"a chunk of {size} columns would cut a tile, which mixer.tile_taps reads whole, and "
            f"the tiles of this prompt need chunks of at least {needed}",
            f"give {needed} or more, or leave it out",
        )
    chunks, start = [], 0
    while start < length:
        stop = min(start + size, length)
        stop = next((begin for begin, end in uncut if begin < stop < end), stop)
        chunks.append(slice(start, stop))
        start = stop
    return chunks


def add_tile_taps(y: Tensor, x: Tensor, taps: Tensor, tiles: Tensor) -> Tensor:
    """Add taps on the columns above-left, above and above-right inside each tile.

        y_t + taps[0] x_{t-g-1} + taps[1] x_{t-g} + taps[2] x_{t-g+1}

    without the terms that leave the tile.

    Args:
        y: (B, T, Ch) in fp32, or fp64 for fp64 inputs.
        x: (B, T, Ch), any floating dtype.
        taps: (3, Ch).
        tiles: (N, g, g), see `tile_columns`.

    Returns:
        (B, T, Ch) in y's dtype.
    """
    columns = tiles.flatten()
    inputs = x.flatten(0, 1).index_select(0, columns).unflatten(0, tiles.shape)
    # The row above each row but the first, with a zero beyond each edge.
    above = F.pad(upcast(inputs[:, :-1]), (0, 0, 1, 1))
    side = tiles.shape[-1]
    left, middle, right = taps.to(above.dtype)
    sums = left * above[:, :, :side]
    sums = torch.addcmul(sums, middle, above[:, :, 1 : side + 1])
    sums = torch.addcmul(sums, right, above[:, :, 2:])
    columns = tiles[:, 1:].flatten()
    return y.flatten(0, 1).index_add(0, columns, sums.flatten(0, 2)).view_as(y)
