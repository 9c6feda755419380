"""Small random models in which every parameter affects the output."""

from __future__ import annotations

from typing import Any

import torch

from mmmamba_cli.architecture import mixer_spec
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig

IMAGE_ID, VOCABULARY, SIDE = 90, 96, 56
MIXERS = {
    "a": "attention",
    "m": "mamba2",
    "d": "gated_delta",
    "k": "kda",
    "g": "gla",
    "w": "window",
}


def small_model(plan: str = "amam", shuffle: str = "pre", seed: int = 0, **options: Any) -> Any:
    """A model of len(plan) layers, half in each stack; each letter is a mixer of `MIXERS`.

    Options: `rope_scaling` and `max_position_embeddings` of both stacks; others are the mixer's.
    """
    half = len(plan) // 2
    stack = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "rope_scaling": options.pop("rope_scaling", None),
        "max_position_embeddings": options.pop("max_position_embeddings", 4096),
    }
    config = HolisticVLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        layer_types=[mixer_spec(MIXERS[letter]).layer_type for letter in plan],
        mixers=[MIXERS[letter] for letter in plan],
        embedding_stack={**stack, "num_layers": half},
        language_stack={**stack, "num_layers": len(plan) - half, "rope_theta": 5e5},
        vision={
            "image_size": SIDE,
            "patch_size": 14,
            "num_channels": 3,
            "downsample_ratio": 0.5,
            "pixel_shuffle": shuffle,
            "image_token_id": IMAGE_ID,
        },
        mixer=options,
        bos_token_id=1,
        pad_token_id=0,
    )
    model = HolisticVLM(config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            scale = 0.5 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(parameter + scale * noise if "norm" in name else scale * noise)
    model.generation_config.suppress_tokens = [IMAGE_ID]
    model.requires_grad_(False)
    return model


def prompt(tiles: int, text: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(1, T) ids of `text` text ids and `tiles` tiles of four context ids, and their pixels."""
    rng = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(2, IMAGE_ID, (1, text), generator=rng)
    if tiles == 0:
        return ids, None
    image = torch.full((1, 4 * tiles), IMAGE_ID)
    pixels = torch.randn(tiles, 3, SIDE, SIDE, generator=rng)
    return torch.cat((ids[:, :2], image, ids[:, 2:]), dim=1), pixels


def pad_batch(rows: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows (1, t) of ids to a (B, T) batch with its mask."""
    width = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask


def join_pixels(pixels: list[torch.Tensor | None]) -> torch.Tensor | None:
    given = [p for p in pixels if p is not None]
    return torch.cat(given) if given else None


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance |a - b| / |b|."""
    return float((a - b).norm() / b.norm())
