"""Export layouts: name map and config per format, and checks that nothing is lost.

An option that a format cannot represent raises an error that names it. The `config.json` of the
HoVLE and mmMamba layouts is derived from the teacher's config or the native one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

import torch

from mmmamba_cli.architecture import MixerConfig, default_mixer, spec_of
from mmmamba_cli.checkpoint import (
    DTYPE_TENSOR,
    AnyCheckpoint,
    Checkpoint,
    InPlaceCheckpoint,
    hovle,
    mmmamba_hf,
    stored_dtype,
)
from mmmamba_cli.checkpoint.name_map import TensorMapping, rename
from mmmamba_cli.errors import CheckpointError, name_some
from mmmamba_cli.model import LINEAR, HolisticVLMConfig, StackConfig
from mmmamba_cli.model.config import INHERITED_FIELDS
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


LANGUAGE_TOKENS = "unused.language_token_embedding.weight"
HUB, MMMAMBA_HF, HOVLE = "hub", "mmmamba-hf", "hovle"
FORMATS = (HUB, MMMAMBA_HF, HOVLE)
# RoPE scaling types that the published code supports; the model supports more.
PUBLISHED_ROPE_SCALINGS = ("dynamic", "linear")
# What a student lacks in the published layout, where all options have their defaults.
PUBLISHED_DEFAULTS = {
    "d_skip": "D skip",
    "qk_norm": "norm on q and k",
    "rope": "RoPE inside the mixer",
    "input_step": "state without input step",
    "tile_taps": "taps inside tiles",
}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is written: a name map, and a `config.json` (None: the native one).

    `dtype` returns the dtype in which a native tensor is written, `body` is that of most of them.
    `parameters` is the number of those that the forward pass uses.
    """

    name: str
    name_map: list[TensorMapping]
    config: dict[str, Any] | None
    dtype: Callable[[str], torch.dtype]
    body: torch.dtype
    parameters: int


def make_layout(checkpoint: AnyCheckpoint, name: str, dtype: torch.dtype | None = None) -> Layout:
    """The layout of `checkpoint` in format `name`; `dtype` None keeps every tensor's dtype.

    Raises `CheckpointError` for an unknown format, or with the features that it cannot represent.
    """
    if name not in FORMATS:
        raise CheckpointError(f"format {name!r} is not known, known are: {', '.join(FORMATS)}")
    if isinstance(checkpoint, InPlaceCheckpoint):
        return _in_place_layout(checkpoint, name, dtype)
    body = dtype or checkpoint.dtype(DTYPE_TENSOR)
    if name == HUB:
        name_map = [rename(key, key, shape) for key, shape in checkpoint.shapes.items()]

        def dtype_of(key: str) -> torch.dtype:
            return checkpoint.dtype(key) if dtype is None else stored_dtype(key, dtype)

        return Layout(name, name_map, None, dtype_of, body, _used(name_map))
    problems = list(_unsupported_features(checkpoint.config, name))
    if problems:
        raise CheckpointError(
            f"format {name} cannot hold {checkpoint.path}: it has no {'; no '.join(problems)}",
            f"--format {HUB} holds everything",
        )
    raw = (hovle_config if name == HOVLE else mmmamba_hf_config)(checkpoint, body)
    _check_config(checkpoint, raw, name)
    table = (hovle if name == HOVLE else mmmamba_hf).name_map(
        raw, checkpoint.config, _written_names(checkpoint, raw)
    )
    _check_complete(checkpoint, table, name)
    return Layout(name, table, raw, lambda key: dtype or checkpoint.dtype(key), body, _used(table))


def _used(name_map: list[TensorMapping]) -> int:
    """Number of parameters that the forward pass uses."""
    return sum(
        prod(shape)
        for mapping in name_map
        for key, shape in mapping.native.items()
        if not key.startswith("unused.")
    )


def _in_place_layout(checkpoint: InPlaceCheckpoint, name: str, dtype: torch.dtype | None) -> Layout:
    """The layout of a student of another teacher, whose tensors keep their names."""
    if checkpoint.plan is None:
        raise CheckpointError(
            f"{checkpoint.path} is a teacher of model_type {checkpoint.model_type}, not a student",
            "export a product that `mmmamba seed` made of it",
        )
    if name != HUB:
        family = "mmMamba" if name == MMMAMBA_HF else "HoVLE"
        raise CheckpointError(
            f"format {name} cannot hold {checkpoint.path}: only {family} models have it, and this "
            f"one is of model_type {checkpoint.model_type}",
            f"--format {HUB} holds everything",
        )
    names, shapes = checkpoint.layout.names, checkpoint.layout.shapes
    small = checkpoint.plan.fp32_parameters

    def stored(key: str) -> torch.dtype:
        own = checkpoint.info(key).dtype
        if dtype is None or not own.is_floating_point:
            return own
        is_small = not small.isdisjoint(names[key].split("."))
        return torch.float32 if is_small and dtype.itemsize < 4 else dtype

    name_map = [rename(key, key, shape) for key, shape in checkpoint.shapes.items()]
    body = dtype or checkpoint.dtype
    return Layout(name, name_map, None, stored, body, sum(map(prod, shapes.values())))


def _unsupported_features(config: HolisticVLMConfig, name: str) -> Iterator[str]:
    """Features of the model that HoVLE's or mmMamba's layout cannot represent."""
    if config.vision is None or config.embedding is None:
        yield "place for a language model without vision"
        return
    mixer = config.mixer_config
    linear = [i for i, kind in enumerate(config.layer_types) if kind == LINEAR]
    if name == HOVLE and linear:
        yield f"linear layers, and layer {linear[0]} is one"
    elif config.mixers is not None:
        other = next(i for i in linear if config.mixers[i] != default_mixer(LINEAR))
        yield f"{spec_of(config, other).title} mixer, and layer {other} is one"
    elif linear:
        if mixer.conv_width != mmmamba_hf.CONV_WIDTH:
            yield f"convolution of width {mixer.conv_width} (mixer.conv_width), only of 2"
        for option in fields(MixerConfig):
            if option.name != "conv_width" and getattr(mixer, option.name) != option.default:
                what = PUBLISHED_DEFAULTS.get(option.name, "other value of an option")
                yield f"{what} (mixer.{option.name})"
    for where, stack in (("embedding", config.embedding), ("language", config.language)):
        if stack.qkv_bias or stack.output_bias:
            yield f"biases in attention ({where} stack)"
        if stack.qk_norm:
            yield f"norm on q and k ({where} stack)"
        if stack.num_heads * stack.head_dim != config.hidden_size:
            yield f"head size other than hidden size / heads ({where} stack)"
        scaling = (stack.rope_scaling or {}).get("type")
        if scaling not in (None, *PUBLISHED_ROPE_SCALINGS):
            yield f"RoPE scaling {scaling!r} ({where} stack)"


def _check_config(checkpoint: Checkpoint, raw: Mapping[str, Any], name: str) -> None:
    """Raise `CheckpointError` unless the exported config reads back as the model's."""
    read = (hovle if name == HOVLE else mmmamba_hf).to_config(raw, "the exported config.json")
    differing = [
        field
        for field in (*INHERITED_FIELDS, "layer_types")
        if getattr(checkpoint.config, field) != getattr(read, field)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: its config.json and its source_config.json disagree on "
            f"{name_some(differing)}",
            "take both from the same product",
        )


def _written_names(checkpoint: Checkpoint, raw: Mapping[str, Any]) -> Collection[str] | None:
    """`names` argument of `name_map`: None stores the head, () leaves out an equal tied head."""
    if not hovle.is_tied(raw) or LANGUAGE_TOKENS not in checkpoint:
        return None
    same = torch.equal(checkpoint.read(LANGUAGE_TOKENS), checkpoint.read("lm_head.weight"))
    return () if same else None


def _check_complete(checkpoint: Checkpoint, name_map: list[TensorMapping], name: str) -> None:
    missing = [key for mapping in name_map for key in mapping.native if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks what format {name} keeps though no forward uses it: "
            f"{name_some(missing)}",
            f"export the run's product instead, or use --format {HUB}",
        )
