"""`config.json` of the HoVLE and mmMamba layouts, from the teacher's config or the native one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from mmmamba_cli.checkpoint import Checkpoint, hovle, mmmamba_hf
from mmmamba_cli.model import HolisticVLMConfig, StackConfig
from mmmamba_cli.processing import HolisticVLMProcessor
from mmmamba_cli.runs import open_processor
from mmmamba_cli.runs.provenance import PROVENANCE_FIELD

# Repositories of the code that reads these layouts; transformers loads it from there.
HOVLE_CODE, MMMAMBA_HF_CODE = "OpenGVLab/HoVLE", mmmamba_hf.CODE_REPOSITORY
# Fields about the origin of a config, and references to code that an export does not contain.
DROPPED_FIELDS = ("_name_or_path", "_commit_hash", "auto_map", "dtype", PROVENANCE_FIELD)


def hovle_config(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """The HoVLE config of a model whose layers are all attention."""
    raw = _shared_fields(checkpoint)
    for section in ("embedding_config", "llm_config"):
        raw[section].pop("layers_block_type", None)
    raw["embedding_config"]["model_type"] = hovle.EMBEDDING_TYPE
    raw["llm_config"] |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}
    return {
        **raw,
        "model_type": hovle.MODEL_TYPE,
        "architectures": ["InternVLChatModel"],
        "torch_dtype": _name(dtype),
        "auto_map": {
            "AutoConfig": f"{HOVLE_CODE}--configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": f"{HOVLE_CODE}--modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": f"{HOVLE_CODE}--modeling_internvl_chat.InternVLChatModel",
        },
    }


def mmmamba_hf_config(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """The config in the published mmMamba layout; `architectures` are plain strings there."""
    raw = _shared_fields(checkpoint)
    config = checkpoint.config
    kinds = [mmmamba_hf.BLOCK_TYPES[kind] for kind in config.layer_types]
    first = config.num_embedding_layers
    raw["embedding_config"] |= {
        "model_type": mmmamba_hf.EMBEDDING_TYPE,
        "layers_block_type": kinds[:first],
    }
    raw["llm_config"] |= {
        "model_type": mmmamba_hf.LANGUAGE_TYPE,
        "architectures": "mmMambaForCausalLM",
        "layers_block_type": kinds[first:],
    }
    return {
        **raw,
        "model_type": mmmamba_hf.MODEL_TYPE,
        "architectures": "mmMambaChatModel",
        "torch_dtype": _name(dtype),
        "auto_map": {
            "AutoConfig": f"{MMMAMBA_HF_CODE}--configuration_mmMamba_chat.mmMambaChatConfig",
            "AutoModel": f"{MMMAMBA_HF_CODE}--modeling_mmMamba_chat.mmMambaChatModel",
            "AutoModelForCausalLM": f"{MMMAMBA_HF_CODE}--modeling_mmMamba_chat.mmMambaChatModel",
        },
    }


def _shared_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """A new config with the fields that both layouts share."""
    if checkpoint.raw_config.get("model_type") in (hovle.MODEL_TYPE, mmmamba_hf.MODEL_TYPE):
        return drop_local_fields(checkpoint.raw_config)
    return _from_native(checkpoint)


def drop_local_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a teacher's config without `DROPPED_FIELDS` at any depth."""
    return {
        key: drop_local_fields(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in raw.items()
        if key not in DROPPED_FIELDS
    }


def _from_native(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    embedding, vision = config.embedding, config.vision_config
    assert embedding is not None
    assert vision is not None
    processor = open_processor(checkpoint)
    pictures: dict[str, Any] = {}
    if isinstance(processor, HolisticVLMProcessor):
        pictures = {
            "template": processor.template,
            "min_dynamic_patch": processor.min_tiles,
            "max_dynamic_patch": processor.max_tiles,
            "use_thumbnail": processor.use_thumbnail,
        }
    return {
        "downsample_ratio": vision.downsample_ratio,
        "force_image_size": vision.image_size,
        "dynamic_image_size": True,
        "normalize_encoder_output": config.normalize_embedding_output,
        **pictures,
        "embedding_config": {
            **_stack(embedding, config),
            "attention_bias": False,
            "mlp_bias": False,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.num_channels,
            "img_context_token_id": vision.image_token_id,
            "llm_vocab_size": config.vocab_size,
            "llm_hidden_size": config.hidden_size,
            "pixel_shuffle_loc": vision.pixel_shuffle,
            "special_token_maps": {},
            "use_ls": False,
            "use_pixel_shuffle_proj": True,
        },
        "llm_config": {
            **_stack(config.language, config),
            "bias": False,
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": False,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        },
    }


def _stack(stack: StackConfig, config: HolisticVLMConfig) -> dict[str, Any]:
    fields = asdict(stack)
    return {
        "hidden_size": config.hidden_size,
        "hidden_act": "silu",
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.num_kv_heads,
        **{
            key: fields[key]
            for key in (
                "intermediate_size",
                "rms_norm_eps",
                "rope_theta",
                "rope_scaling",
                "max_position_embeddings",
            )
        },
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
