"""What a forward pass would read of its inputs, computed from the batch on the CPU.

Classes of transformers compute positions and the shapes of pictures from values of their inputs.
On a GPU each value that is read makes the host wait until all queued kernels have run. These are
the arguments that the classes take instead. Legend: B rows, T columns, N pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from mmmamba_cli.teachers.mixer_plan import teacher_type
from mmmamba_cli.teachers.packed_positions import GRIDS, MODALITIES, packed_position_ids

MASK, POSITIONS = "attention_mask", "position_ids"
# Sizes and numbers of pictures (LLaVA-OneVision, Mistral 3), of which classes only read values.
SIZES = ("image_sizes", "batch_num_images")
# Attention that splits the patches of a tower by lengths on the CPU.
SPLIT_BY_LENGTHS = frozenset({"eager", "sdpa"})


@dataclass(frozen=True)
class CallArguments:
    """Arguments of a forward pass that replace inputs of the batch, all on the CPU.

    Attributes:
        to_copy: tensors that the model needs on its device.
        on_host: tensors whose values are read, and numbers.
        needs_mask: whether the call needs `attention_mask`.
    """

    to_copy: dict[str, Tensor] = field(default_factory=dict)
    on_host: dict[str, Any] = field(default_factory=dict)
    needs_mask: bool = True


def call_arguments(
    model: Any, inputs: Mapping[str, Tensor], seq_idx: Tensor | None = None
) -> CallArguments:
    """The arguments for a batch on the CPU; without a cache the results of the call are the same.

    Families with multimodal RoPE and a tower of packed patches (`TOWERS`) get positions, and what
    their tower reads of the grids. Others get positions of packed rows only.

    Args:
        model: a teacher or a student, with its head.
        inputs: arguments of its forward, `input_ids` (B, T) and `attention_mask` (B, T) among them;
            grids (N, 3).
        seq_idx: (B, T) int64, number of the conversation within its row; None for one in each.
    """
    tower = TOWERS.get(teacher_type(model.config.model_type))
    to_copy: dict[str, Tensor] = {}
    on_host: dict[str, Any] = {name: inputs[name] for name in SIZES if name in inputs}
    for name in GRIDS if tower is not None else ():
        if name in inputs:
            on_host[name] = inputs[name]
            copied, read = tower_arguments(model, inputs[name])
            prefix = name.partition("_")[0]
            to_copy |= {f"{prefix}_{key}": value for key, value in copied.items()}
            on_host |= {f"{prefix}_{key}": value for key, value in read.items()}
    if seq_idx is not None:
        # transformers reads packing from positions, and only without a mask.
        to_copy[POSITIONS] = packed_position_ids(model, inputs, seq_idx)
        return CallArguments(to_copy, on_host, needs_mask=False)
    positions = _multimodal_positions(model, inputs) if tower is not None else None
    if positions is None:
        return CallArguments(to_copy, on_host)
    to_copy[POSITIONS] = positions
    # Without padding the mask says nothing, and is read.
    return CallArguments(to_copy, on_host, needs_mask=not bool(inputs[MASK].all()))


def _multimodal_positions(model: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """(3, B, T) int64 as the class counts them; None for padded rows without pictures."""
    if MODALITIES in inputs and any(name in inputs for name in GRIDS):
        count = model.base_model.get_rope_index
        wanted = inspect.signature(count).parameters
        positions: Tensor = count(**{name: inputs[name] for name in inputs if name in wanted})[0]
        return positions
    if not bool(inputs[MASK].all()):
        return None
    rows, length = inputs["input_ids"].shape
    return torch.arange(length, device=inputs["input_ids"].device).expand(3, rows, length)


def tower_arguments(model: Any, grids: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the tower of a model in `TOWERS` computes of `grids` (N, 3): frames, rows and columns.

    Returns:
        Its arguments on its device, and those whose values are read.
    """
    visual = model.base_model.visual
    copied, lengths = TOWERS[teacher_type(model.config.model_type)](visual, grids)
    if visual.config._attn_implementation in SPLIT_BY_LENGTHS:
        return copied, lengths
    # Flash attention takes the lengths on the device, and the longest as a number.
    longest = {
        name.replace("cu_", "max_").removesuffix("s"): int(ends.diff().max())
        for name, ends in lengths.items()
    }
    return copied | lengths, longest


def _packed_tower(visual: Any, grids: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    positions = get_vision_position_ids(grids, visual.spatial_merge_size)
    return {"position_ids": positions}, {"cu_seqlens": get_vision_cu_seqlens(grids)}


def _windowed_tower(visual: Any, grids: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    copied, lengths = _packed_tower(visual, grids)
    copied["window_index"], lengths["cu_window_seqlens"] = get_vision_window_index(
        grids, visual.spatial_merge_size, visual.window_size, visual.patch_size
    )
    return copied, lengths


def _interpolating_tower(visual: Any, grids: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    copied, lengths = _packed_tower(visual, grids)
    copied["interp_indices"], copied["interp_weights"] = (
        get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.config.spatial_merge_size,
        )
    )
    return copied, lengths


# Families with multimodal RoPE whose towers take packed patches, and the arguments of the tower.
TOWERS: dict[str, Callable[[Any, Tensor], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "qwen2_vl": _packed_tower,
    "qwen2_5_vl": _windowed_tower,
    "qwen3_vl": _interpolating_tower,
    "qwen3_vl_moe": _interpolating_tower,
}
