"""Inputs with a video, as the families' processors make them, without torchvision.

A video processor of transformers needs torchvision; where it is installed, a test compares these
inputs with the processor's.
"""

from __future__ import annotations

from typing import Any

import torch
from families import Family, rendered
from teacher_processors import PATCH, TILE

FRAMES = 4
# Merged patches of a frame, and the tokens of a frame after LLaVA-OneVision's pooling by two.
FRAME_TOKENS = (TILE // PATCH // 2) ** 2
TEMPORAL_PATCH = 2


def frames(count: int = FRAMES, seed: int = 0) -> torch.Tensor:
    """Random frames of one tile, normalized: (`count`, 3, TILE, TILE) in float32."""
    return torch.randn(count, 3, TILE, TILE, generator=torch.Generator().manual_seed(seed))


def qwen_patches(video: torch.Tensor) -> dict[str, torch.Tensor]:
    """Patches of two frames, ordered by blocks of 2 x 2 patches: (patches, 3 * 2 * PATCH ** 2)."""
    side = TILE // PATCH // 2
    blocks = video.reshape(-1, TEMPORAL_PATCH, 3, side, 2, PATCH, side, 2, PATCH)
    ordered = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return {
        "pixel_values_videos": ordered.reshape(-1, 3 * TEMPORAL_PATCH * PATCH**2),
        "video_grid_thw": torch.tensor([[len(blocks), 2 * side, 2 * side]]),
    }


def qwen2_5_vl(video: torch.Tensor) -> tuple[str, dict[str, Any]]:
    tokens = "<|video_pad|>" * (len(video) // TEMPORAL_PATCH * FRAME_TOKENS)
    inputs = qwen_patches(video) | {"second_per_grid_ts": torch.tensor([1.0])}
    return f"<|vision_start|>{tokens}<|vision_end|>", inputs


def qwen3_vl(video: torch.Tensor) -> tuple[str, dict[str, Any]]:
    frame = f"<|vision_start|>{'<|video_pad|>' * FRAME_TOKENS}<|vision_end|>"
    times = range(len(video) // TEMPORAL_PATCH)
    return "".join(f"<{time + 0.2:.1f} seconds>{frame}" for time in times), qwen_patches(video)


def internvl(video: torch.Tensor) -> tuple[str, dict[str, Any]]:
    tile = f"<img>{'<IMG_CONTEXT>' * FRAME_TOKENS}</img>"
    lines = [f"Frame{number + 1}: {tile}" for number in range(len(video))]
    return "\n".join(lines) + "\n", {"pixel_values": video}


def llava_onevision(video: torch.Tensor) -> tuple[str, dict[str, Any]]:
    # One token more: the end of the video's features.
    return "<video>" * (len(video) * FRAME_TOKENS + 1), {"pixel_values_videos": video[None]}


def smolvlm(video: torch.Tensor) -> tuple[str, dict[str, Any]]:
    mark = "<fake_token_around_image>"
    tile = f"{mark}<global-img>{'<image>' * FRAME_TOKENS}{mark}"
    lines = [f"\nFrame from 00:0{second}:{tile}" for second in range(len(video))]
    text = f"You are provided the following series of {len(video)} frames." + "".join(lines)
    inputs = {
        "pixel_values": video[None],
        "pixel_attention_mask": torch.ones(1, len(video), TILE, TILE, dtype=torch.long),
    }
    return text + "\n\n", inputs


def video_prompt(family: Family, words: str, count: int = FRAMES) -> dict[str, Any]:
    """The inputs of a model for one row with a video of `count` frames before its words.

    Raises:
        KeyError: the family takes no video.
    """
    makers = {
        "qwen2_5_vl": qwen2_5_vl,
        "qwen3_vl": qwen3_vl,
        "internvl": internvl,
        "llava_onevision": llava_onevision,
        "smolvlm": smolvlm,
    }
    placeholder, pixels = makers[family.name](frames(count))
    text = rendered(family, placeholder + words)
    tokens = dict(family.tokenizer(text, add_special_tokens=False, return_tensors="pt"))
    if family.name.startswith("qwen"):
        pad = family.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        tokens["mm_token_type_ids"] = 2 * (tokens["input_ids"] == pad).long()
    return tokens | pixels
