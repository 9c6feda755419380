"""Tiny configs of families that cannot be converted, without weights.

`REFUSED` maps a name to a function that makes the config, and to the field that rules it out. A
family that the installed transformers does not have yet is left out of `refused_configs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
# Multi-head latent attention: keys and values are projected up from a shared small vector.
LATENT = TEXT | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
GATED_DELTA = TEXT | {
    "head_dim": 8,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def gemma4() -> PreTrainedConfig:
    text = TEXT | {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
    }
    tower = {**TOWER, "num_key_value_heads": 2, "head_dim": 8}
    return transformers.Gemma4Config(text_config=text, vision_config=tower, audio_config=None)


def gemma3n() -> PreTrainedConfig:
    text = TEXT | {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    return transformers.Gemma3nConfig(text_config=text)


def deepseek_v2() -> PreTrainedConfig:
    return transformers.DeepseekV2Config(**LATENT)


def deepseek_v3() -> PreTrainedConfig:
    return transformers.DeepseekV3Config(**LATENT)


def kimi_k25() -> PreTrainedConfig:
    return transformers.Kimi_K25Config(text_config={"model_type": "deepseek_v3", **LATENT})


def phi4_multimodal() -> PreTrainedConfig:
    return transformers.Phi4MultimodalConfig(**TEXT, vision_config=dict(TOWER))


def phi3() -> PreTrainedConfig:
    return transformers.Phi3Config(**TEXT)


def qwen3_5() -> PreTrainedConfig:
    return transformers.Qwen3_5Config(text_config=GATED_DELTA, vision_config=QWEN_TOWER)


def qwen3_5_moe() -> PreTrainedConfig:
    return transformers.Qwen3_5MoeConfig(
        text_config=GATED_DELTA | EXPERTS, vision_config=QWEN_TOWER
    )


def qwen3_next() -> PreTrainedConfig:
    return transformers.Qwen3NextConfig(**GATED_DELTA, **EXPERTS)


def lfm2_vl() -> PreTrainedConfig:
    text = TEXT | {"layer_types": ["conv", "conv", "full_attention", "conv"]}
    return transformers.Lfm2VlConfig(
        text_config={"model_type": "lfm2", **text},
        vision_config={"model_type": "siglip2_vision_model", **TOWER, "num_patches": 16},
    )


def mllama() -> PreTrainedConfig:
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "attention_heads": 2, "image_size": 16}
    return transformers.MllamaConfig(
        text_config=TEXT | {"cross_attention_layers": [1]}, vision_config=tower
    )


# The field of the config that a refusal names.
REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "gemma4": (gemma4, "num_kv_shared_layers"),
    "gemma3n": (gemma3n, "num_kv_shared_layers"),
    "deepseek_v2": (deepseek_v2, "kv_lora_rank"),
    "deepseek_v3": (deepseek_v3, "kv_lora_rank"),
    "kimi_k25": (kimi_k25, "kv_lora_rank"),
    "phi4_multimodal": (phi4_multimodal, "model_type"),
    "phi3": (phi3, "model_type"),
    "qwen3_5": (qwen3_5, "layer_types"),
    "qwen3_5_moe": (qwen3_5_moe, "layer_types"),
    "qwen3_next": (qwen3_next, "layer_types"),
    "lfm2_vl": (lfm2_vl, "layer_types"),
    "mllama": (mllama, "cross_attention_layers"),
}


def refused_config(name: str) -> PreTrainedConfig:
    return REFUSED[name][0]()


def known_to_transformers(name: str) -> bool:
    """Whether the installed transformers has the family."""
    known: Any = transformers.CONFIG_MAPPING
    return name in known
