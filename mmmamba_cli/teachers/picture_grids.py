"""Where the pictures of a call lie among its columns, as grids of image tokens.

Legend: B batch, T columns, N grids, H rows and W columns of a grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Inputs that hold the frames, rows and columns of patches of each picture, with the field of the
# config that names their token.
PATCH_GRIDS = {"image_grid_thw": "image", "video_grid_thw": "video"}


def picture_token_id(config: Any, kind: str = "image") -> int | None:
    """The id of an image token, or of a video's; None for a model without pictures."""
    for field in (f"{kind}_token_id", f"{kind}_token_index"):
        found = getattr(config, field, None)
        if found is not None:
            return int(found)
    return None


def picture_grids(config: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Grids of image tokens, (N, H, W) int64 each, as flat indices into the (B * T) columns.

    Grids come from `image_grid_thw` and `video_grid_thw` (Qwen-VL), or from the tokens of a square
    tile in the config (InternVL, SmolVLM, Idefics3, Gemma 3). Rows of equal length with one token
    between them are a grid too (Mistral 3). Any other picture is one row in reading order, so that
    a token has the neighbours before and behind it only.

    Args:
        config: of the teacher or the student.
        inputs: arguments of a forward pass; `input_ids` (B, T) is one of them.
    """
    ids = inputs["input_ids"]
    grids: list[Tensor] = []
    for name, kind in PATCH_GRIDS.items():
        if name in inputs:
            columns = _is_token(ids, config, kind).flatten().nonzero().flatten()
            merge = int(config.vision_config.spatial_merge_size)
            grids += _patch_grids(columns, inputs[name], merge)
    if not grids:
        is_image = _is_token(ids, config, "image").cpu()
        grids = [grid.to(ids.device) for grid in _grids_of_runs(is_image, _tile_tokens(config))]
    return grids


def _is_token(ids: Tensor, config: Any, kind: str) -> Tensor:
    """(B, T) bool, True at the tokens of pictures or videos."""
    token = picture_token_id(config, kind)
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids.eq(token)


def _patch_grids(columns: Tensor, sizes: Tensor, merge: int) -> Iterator[Tensor]:
    """The grids of pictures of `sizes` (pictures, 3) patches, among the image `columns`."""
    begin = 0
    for frames, rows, width in sizes.tolist():
        shape = (frames, rows // merge, width // merge)
        end = begin + shape[0] * shape[1] * shape[2]
        yield columns[begin:end].view(shape)
        begin = end


def _tile_tokens(config: Any) -> int | None:
    """Image tokens of a square tile; None in families without such tiles."""
    for field in ("image_seq_length", "mm_tokens_per_image"):
        if getattr(config, field, None):
            return int(getattr(config, field))
    factor, vision = getattr(config, "scale_factor", None), getattr(config, "vision_config", None)
    if factor is None or vision is None:
        return None
    return int(vision.image_size // vision.patch_size // factor) ** 2


def _grids_of_runs(is_image: Tensor, tile: int | None) -> Iterator[Tensor]:
    """Grids of the runs of image tokens of `is_image` (B, T) bool on the CPU."""
    length = is_image.shape[1]
    for row, columns in enumerate(is_image):
        runs = [(row * length + first, size) for first, size in _runs(columns)]
        while runs:
            (first, size), *_ = runs
            if tile is not None and size % tile == 0:
                side = round(tile**0.5)
                yield torch.arange(first, first + size).view(-1, side, side)
                runs = runs[1:]
                continue
            lines = 1
            while lines < len(runs) and runs[lines] == (first + lines * (size + 1), size):
                lines += 1
            begins = first + (size + 1) * torch.arange(lines)
            yield (begins[:, None] + torch.arange(size))[None]
            runs = runs[lines:]


def _runs(columns: Tensor) -> Iterator[tuple[int, int]]:
    """First column and length of each run of True in (T,) bool."""
    edges = torch.diff(columns.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    begins, ends = (edges > 0).nonzero().flatten(), (edges < 0).nonzero().flatten()
    yield from zip(begins.tolist(), (ends - begins).tolist(), strict=True)
