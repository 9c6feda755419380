"""Config and random weights of the small teacher, a HoVLE with 7 M parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmmamba_cli.checkpoint import hovle
from mmmamba_cli.model import HolisticVLM

TILE, PATCH = 224, 14
STACK = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LAYERS = {"embedding_config": 2, "llm_config": 6}
MOST_TILES = 12
ROTATION = ("rope_theta", "rope_scaling", "max_position_embeddings")


def teacher_config(special: Mapping[str, int], vocabulary: int) -> dict[str, Any]:
    """HoVLE-2.6B's config with small sizes and `vocabulary` rows in the token embedding."""
    large = hovle.ARCHITECTURES["hovle-2.6b"]
    raw = {**large, "force_image_size": TILE, "max_dynamic_patch": MOST_TILES}
    for name, layers in LAYERS.items():
        raw[name] = {**large[name], **STACK, "num_hidden_layers": layers}
    raw["embedding_config"] |= {
        "image_size": TILE,
        "patch_size": PATCH,
        "img_context_token_id": special["<IMG_CONTEXT>"],
        "llm_vocab_size": vocabulary,
        "llm_hidden_size": STACK["hidden_size"],
        # The same as in the language model: both stacks read the whole input.
        **{name: large["llm_config"][name] for name in ROTATION},
    }
    raw["llm_config"] |= {"vocab_size": vocabulary}
    return raw


def random_teacher(raw: Mapping[str, Any], seed: int) -> HolisticVLM:
    """Model with normal random weights in fp32; block outputs are scaled down by depth."""
    torch.manual_seed(seed)
    model = HolisticVLM(hovle.to_config(raw))
    depth = model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.04 / (2 * depth) ** 0.5)
        elif "projector" in name or "patch_embedding" in name:
            fan_in = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=fan_in**-0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.04)
    return model
