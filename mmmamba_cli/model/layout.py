"""Where image tokens sit in a prompt, and the longer sequence the embedding stack may see.

Legend: B batch, T columns of the prompt as the caller gives it, E columns as the embedding stack
sees it, r patches that become one image token, N tiles.

Callers give `tokens_per_tile` context ids a tile. With the pixel shuffle behind the embedding
stack ("post") that stack sees every patch: each context id stands for r columns there. Rows then
differ in length by their images, and are padded on the left, so that decoding can go on at the
right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError


@dataclass(frozen=True)
class Expansion:
    """The prompt as the embedding stack sees it.

    `source` (B, E) is the flat index into the (B * T) columns that each column stands for, -1 for
    padding; `last` (B, T) the column of each original column (its last one, if several).
    """

    source: Tensor
    last: Tensor

    @property
    def extra_columns(self) -> int:
        return self.source.shape[1] - self.last.shape[1]

    def spread(self, values: Tensor, fill: int) -> Tensor:
        """Values (B, T) of the prompt's columns, laid out as (B, E)."""
        spread = values.flatten()[self.source.clamp(min=0)]
        return torch.where(self.source < 0, torch.full_like(spread, fill), spread)


def expand(is_image: Tensor, ratio: int) -> Expansion:
    """Make `ratio` columns of each image column; `is_image` is (B, T) bool."""
    rows, length = is_image.shape
    counts = torch.where(is_image, ratio, 1)
    ends = counts.cumsum(1)
    totals = ends[:, -1]
    width = int(totals.max())
    flat = torch.arange(rows * length, device=is_image.device).repeat_interleave(counts.flatten())
    row = flat // length
    begin = totals.cumsum(0) - totals
    shift = width - totals
    column = torch.arange(flat.numel(), device=flat.device) - begin[row] + shift[row]
    source = torch.full((rows, width), -1, dtype=torch.long, device=flat.device)
    source[row, column] = flat
    return Expansion(source, ends - 1 + shift.unsqueeze(1))


def count_tiles(is_image: Tensor, tokens_per_tile: int, num_tiles: int) -> None:
    """Check that the context ids of a prompt are just those its tiles need.

    Raises `DataError` if their number differs, in all or by a fraction of a tile in a row.
    """
    per_row = is_image.sum(1)
    total = int(per_row.sum())
    if total != num_tiles * tokens_per_tile:
        raise DataError(
            f"the prompt has {total} image context tokens, but {num_tiles} tiles of "
            f"{tokens_per_tile} need {num_tiles * tokens_per_tile}",
            "let the processor write them, or pass the pixel_values of all images, and only those",
        )
    if bool((per_row % tokens_per_tile).any()):
        raise DataError(
            f"a row of the batch has image context tokens for a fraction of a tile "
            f"({per_row.tolist()} tokens a row, {tokens_per_tile} a tile)",
            "an image's tokens belong into one row",
        )
