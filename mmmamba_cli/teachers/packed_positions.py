"""Positions of packed rows, which attention and mixers read to tell conversations apart.

Legend: B rows, T columns, S conversations, L columns of the longest one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Inputs that say where multimodal positions leave the text's.
GRIDS = ("image_grid_thw", "video_grid_thw")
MODALITIES = "mm_token_type_ids"


def packed_position_ids(model: Any, inputs: Mapping[str, Tensor], seq_idx: Tensor) -> Tensor:
    """`position_ids` of packed rows, for a forward pass of `model` without a mask and a cache.

    Positions begin again at 0 in each conversation. A class with multimodal RoPE
    (`get_rope_index`) counts its own for each conversation alone.

    Args:
        model: a teacher or a student, with its head.
        inputs: arguments of its forward, `input_ids` (B, T) among them; grids of pictures in the
            order of the conversations.
        seq_idx: (B, T) int64, number of the conversation within its row.

    Returns:
        (B, T) int64; with multimodal RoPE (4, B, T), the first row of which counts the text.
    """
    counts = _restarting(seq_idx)
    count_multimodal = getattr(model.base_model, "get_rope_index", None)
    if count_multimodal is None:
        return counts
    if MODALITIES not in inputs or not any(name in inputs for name in GRIDS):
        return counts.expand(4, -1, -1)
    # (B * T) places in (S, L): conversations are counted over all rows.
    begins = (counts == 0).flatten()
    length = int(counts.max()) + 1
    places = (begins.long().cumsum(0) - 1) * length + counts.flatten()
    shape = (int(begins.sum()), length)

    def unpacked(value: Tensor) -> Tensor:
        return value.new_zeros(shape).flatten().scatter(0, places, value.flatten()).view(shape)

    known = {
        **inputs,
        "input_ids": unpacked(inputs["input_ids"]),
        MODALITIES: unpacked(inputs[MODALITIES]),
        "attention_mask": unpacked(torch.ones_like(seq_idx)),
    }
    wanted = inspect.signature(count_multimodal).parameters
    positions, _ = count_multimodal(**{name: known[name] for name in known if name in wanted})
    packed = positions.flatten(1)[:, places].view(-1, *counts.shape)
    return torch.cat((counts[None], packed))


def _restarting(seq_idx: Tensor) -> Tensor:
    """(B, T) columns counted from the first one of each sequence."""
    columns = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    is_first = torch.ones_like(seq_idx, dtype=torch.bool)
    is_first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return columns - torch.where(is_first, columns, 0).cummax(1).values
