"""Image tokens in a prompt, and their expansion into patches for the embedding stack.

Callers pass `tokens_per_tile` context ids per tile. With the pixel shuffle after the embedding
stack ("post"), that stack sees every patch: a context id becomes r columns. Rows with images of
different sizes then differ in length and are padded on the left, so that decoding continues on the
right. Legend: B batch, T columns of the prompt, E columns of the embedding stack, r patches per
image token, N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba_cli.errors import DataError
from mmmamba_cli.model.config import HolisticVisionConfig


@dataclass(frozen=True)
class Expansion:
    """Mapping between the columns of a prompt and those of the embedding stack.

    `source` (B, E) is the flat index into the (B * T) prompt columns, -1 for padding; `first` and
    `last` (B, T) are the first and last embedding column of each prompt column. `is_padded` tells
    whether rows differ in length, so that `source` has padding.
    """

    source: Tensor
    first: Tensor
    last: Tensor
    is_padded: bool

    @property
    def extra_columns(self) -> int:
        return self.source.shape[1] - self.last.shape[1]

    def expand(self, values: Tensor, fill: int) -> Tensor:
        """Repeat values (B, T) of prompt columns over their embedding columns, (B, E)."""
        spread = values.flatten()[self.source.clamp(min=0)]
        return torch.where(self.source < 0, torch.full_like(spread, fill), spread)


def expand_image_columns(is_image: Tensor, ratio: int, images_per_row: Tensor) -> Expansion:
    """Expand each image column of `is_image` (B, T) bool into `ratio` columns.

    `images_per_row` (B,) are the sums of `is_image`. On the CPU, nothing waits for a GPU.
    """
    rows, length = is_image.shape
    images = images_per_row.tolist()
    counts = torch.where(is_image, ratio, 1)
    ends = counts.cumsum(1)
    totals = ends[:, -1]
    width = length + (ratio - 1) * max(images)
    flat = torch.arange(rows * length, device=is_image.device).repeat_interleave(
        counts.flatten(), output_size=rows * length + (ratio - 1) * sum(images)
    )
    row = flat // length
    begin = totals.cumsum(0) - totals
    shift = width - totals
    column = torch.arange(flat.numel(), device=flat.device) - begin[row] + shift[row]
    source = torch.full((rows, width), -1, dtype=torch.long, device=flat.device)
    source[row, column] = flat
    last = ends - 1 + shift.unsqueeze(1)
    return Expansion(source, last - counts + 1, last, is_padded=min(images) < max(images))


def require_vision(vision: HolisticVisionConfig | None) -> HolisticVisionConfig:
    """Return the vision config; raise `DataError` for a model without one."""
    if vision is None:
        raise DataError("this model has no vision part", "leave out pixel_values")
    return vision


def image_token_mask(
    vision: HolisticVisionConfig | None,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    text_embedding: nn.Embedding,
) -> Tensor:
    """(B, T) bool, True at image tokens.

    In `inputs_embeds`, an image token is a column equal to the embedding of the context id.

    Raises:
        DataError: a model without vision, or `inputs_embeds` with the pixel shuffle "post".
    """
    vision = require_vision(vision)
    if input_ids is not None:
        return input_ids == vision.image_token_id
    assert inputs_embeds is not None
    if vision.pixel_shuffle == "post":
        raise DataError(
            "inputs_embeds cannot hold pictures where the pixel shuffle comes after the "
            "embedding stack, which sees every patch of them",
            "pass input_ids with the pixel_values",
        )
    context = torch.tensor([vision.image_token_id], device=inputs_embeds.device)
    return (inputs_embeds == text_embedding(context)).all(-1)


def check_tile_count(is_image: Tensor, tokens_per_tile: int, num_tiles: int) -> None:
    """Check that the number of context ids matches the number of tiles.

    Raises:
        DataError: the total differs, or a row holds a fraction of a tile.
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


def select_new_tiles(
    pixel_values: Tensor, is_image: Tensor, tokens_per_tile: int, seen: Tensor
) -> Tensor:
    """Select the tiles of `pixel_values` that belong to the columns `is_image` (B, T) of this call.

    `seen` (B,) counts the tiles in the cache. `pixel_values` holds the tiles of the new columns, or
    of the whole conversation, row by row.

    Raises:
        DataError: the number of tiles matches neither.
    """
    counts = is_image.sum(1) // tokens_per_tile
    per_row = tiles_per_row(counts, seen, len(pixel_values))
    if torch.equal(per_row, counts):
        return pixel_values
    rows = pixel_values.split(per_row.tolist())
    return torch.cat(
        [row[len(row) - new :] for row, new in zip(rows, counts.tolist(), strict=True)]
    )


def tiles_per_row(counts: Tensor, seen: Tensor, num_tiles: int) -> Tensor:
    """Number of the `num_tiles` tiles in each row, (B,): `counts`, or `counts + seen`.

    Raises:
        DataError: `num_tiles` matches neither.
    """
    new, before = int(counts.sum()), int(seen.sum())
    if num_tiles == new:
        return counts
    if num_tiles == before + new:
        return counts + seen.to(counts.device)
    raise DataError(
        f"pixel_values has {num_tiles} tiles, but the new columns need {new} and the columns in "
        f"the cache hold {before}",
        "pass the tiles of the new columns, or those of the whole conversation",
    )


@dataclass
class ImageColumns:
    """Positions of images among the columns of a cache; columns after these n are text.

    `is_image` is (B, n) bool. `begins` and `ends` (B, n) delimit the embedding columns of each
    column, None while both stacks see the same columns.
    """

    tokens_per_tile: int
    is_image: Tensor
    begins: Tensor | None = None
    ends: Tensor | None = None

    def count_row_tiles(self) -> Tensor:
        """Number of tiles in each row, (B,) int64."""
        return self.is_image.sum(1) // self.tokens_per_tile

    def extend(
        self, is_image: Tensor, expansion: Expansion | None, length: int, embedding_length: int
    ) -> None:
        """Append the columns (B, T) of a call.

        They follow `length` columns, and `embedding_length` columns of the embedding stack.
        """
        text = length - self.is_image.shape[1]
        if expansion is not None:
            ends = expansion.last + 1 + embedding_length
            begins = expansion.first + embedding_length
            if self.begins is not None and self.ends is not None:
                between = torch.arange(
                    embedding_length - text, embedding_length, device=ends.device
                )
                between = between.expand(len(ends), -1)
                begins = torch.cat((self.begins, between, begins), dim=1)
                ends = torch.cat((self.ends, between + 1, ends), dim=1)
            self.begins, self.ends = begins, ends
        self.is_image = torch.cat((F.pad(self.is_image, (0, text)), is_image), dim=1)

    def select_rows(self, rows: Tensor) -> None:
        """Keep, reorder or repeat the rows of the batch."""
        for name in ("is_image", "begins", "ends"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, rows.to(value.device)))

    def count_embedding_columns(self, columns: int, length: int, embedding_length: int) -> int:
        """Columns of the embedding stack that the first `columns` of `length` correspond to.

        Raises:
            DataError: they end within an image, or rows differ in this number.
        """
        if columns >= self.is_image.shape[1]:
            return embedding_length - (length - columns)
        cut = self.is_image[:, :columns].sum(1) % self.tokens_per_tile
        if bool(cut.any()):
            raise DataError(
                f"the cache cannot be cropped to {columns} columns, which ends within an image",
                "crop before the image or behind it",
            )
        if self.begins is None or self.ends is None:
            return columns if embedding_length else 0
        kept = int(self.ends[:, columns - 1].max()) if columns else 0
        if kept > int(self.begins[:, columns].min()):
            raise DataError(
                f"the cache cannot be cropped to {columns} columns: its rows have images of "
                "different sizes before that",
                "crop behind the images, or keep a cache for each row",
            )
        return kept

    def crop(self, columns: int) -> None:
        """Keep the first `columns` columns."""
        for name in ("is_image", "begins", "ends"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[:, :columns])
