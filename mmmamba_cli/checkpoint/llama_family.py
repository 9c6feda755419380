"""Llama, Qwen2, Qwen3 and InternLM2 as teachers: their configs and name maps.

All use the native block; they differ in tensor names, biases, a norm on q and k, and config
defaults. An unsupported option that would change the computation raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmmamba_cli.architecture import ATTENTION, Architecture, ModelShape, StackConfig
from mmmamba_cli.checkpoint.config_fields import (
    positive_int,
    require_value,
    stack_fields,
    token_ids,
)
from mmmamba_cli.checkpoint.hovle import internlm2_block
from mmmamba_cli.checkpoint.name_map import Shape, TensorMapping, Tensors, rename
from mmmamba_cli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from mmmamba_cli.model import HolisticVLMConfig

# RoPE tables that old conversions stored with the weights; they are derived from the config.
DERIVED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one `model_type` differ from those of the others.

    `defaults` are the values of fields that a config leaves out. `required` are fields with only
    one supported value. `packed` selects InternLM2's names, with q, k and v in one tensor.
    """

    defaults: Mapping[str, Any]
    required: Mapping[str, Any]
    qkv_bias: bool = False
    qk_norm: bool = False
    # `attention_bias` in the config gives all four projections a bias.
    optional_bias: bool = False
    packed: bool = False
    names: Mapping[str, str] = field(
        default_factory=lambda: {"tokens": "model.embed_tokens.weight", "head": "lm_head.weight"}
    )


QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_window_layers": 28,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        required={"hidden_act": "silu", "mlp_bias": False},
        optional_bias=True,
    ),
    "qwen2": Family(defaults=QWEN_DEFAULTS, required={"hidden_act": "silu"}, qkv_bias=True),
    "qwen3": Family(
        defaults={**QWEN_DEFAULTS, "head_dim": 128},
        required={"hidden_act": "silu"},
        qk_norm=True,
        optional_bias=True,
    ),
    "internlm2": Family(
        defaults={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        required={"hidden_act": "silu", "bias": False},
        packed=True,
        names={"tokens": "model.tok_embeddings.weight", "head": "output.weight"},
    ),
}
MODEL_TYPES = tuple(FAMILIES)


def to_config(raw: Mapping[str, Any], where: str = "config.json") -> HolisticVLMConfig:
    """Convert the config of a plain language model to the model's. Raises `CheckpointError`."""
    from mmmamba_cli.checkpoint.native_config import to_model_config

    return to_model_config(to_architecture(raw, where))


def to_architecture(raw: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Convert the config of a model whose `model_type` is in `MODEL_TYPES`.

    All layers are attention, in one stack, without vision. Raises `CheckpointError` that names
    the field.
    """
    family = FAMILIES[raw["model_type"]]
    section = {**family.defaults, **raw}
    for key, value in family.required.items():
        require_value(section, key, value, where)
    _check_no_sliding_window(section, where)
    shape = stack_fields(section, where)
    biased = family.optional_bias and bool(section.get("attention_bias", False))
    return Architecture(
        vocab_size=positive_int(section, "vocab_size", where),
        hidden_size=positive_int(section, "hidden_size", where),
        layer_types=[ATTENTION] * shape["num_layers"],
        language_stack={
            **shape,
            "qkv_bias": family.qkv_bias or biased,
            "output_bias": biased,
            "qk_norm": family.qk_norm,
        },
        tie_word_embeddings=bool(section.get("tie_word_embeddings", False)),
        bos_token_id=token_ids(section, "bos_token_id", where),
        eos_token_id=token_ids(section, "eos_token_id", where),
        pad_token_id=token_ids(section, "pad_token_id", where),
    )


def name_map(
    raw: Mapping[str, Any], config: ModelShape, names: Collection[str] | None = None
) -> list[TensorMapping]:
    """The name map of a plain language model (all layers attention).

    `names` of the tensors in the file show whether a tied head is stored as well.
    """
    family = FAMILIES[raw["model_type"]]
    vocabulary = (config.vocab_size, config.hidden_size)
    tokens, head = family.names["tokens"], family.names["head"]
    table = []
    if not config.tie_word_embeddings:
        table.append(rename(tokens, "model.text_embedding.weight", vocabulary))
        table.append(rename(head, "lm_head.weight", vocabulary))
    elif names is not None and head in names:
        table.append(_duplicated_head(tokens, head, vocabulary))
    else:
        table.append(rename(tokens, "model.text_embedding.weight", vocabulary))
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        if family.packed:
            table += internlm2_block(name, name, config, layer)
        else:
            table += _attention_block(name, config.hidden_size, config.language)
    table.append(rename("model.norm.weight", "model.norm.weight", (config.hidden_size,)))
    return table


def _attention_block(name: str, hidden: int, stack: StackConfig) -> list[TensorMapping]:
    """Mappings of one layer of Llama, Qwen2 or Qwen3."""
    wide, narrow = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    inner = stack.intermediate_size
    shapes: dict[str, Shape] = {
        "q_proj.weight": (wide, hidden),
        "k_proj.weight": (narrow, hidden),
        "v_proj.weight": (narrow, hidden),
        "o_proj.weight": (hidden, wide),
    }
    if stack.qkv_bias:
        shapes |= {"q_proj.bias": (wide,), "k_proj.bias": (narrow,), "v_proj.bias": (narrow,)}
    if stack.output_bias:
        shapes["o_proj.bias"] = (hidden,)
    if stack.qk_norm:
        shapes |= {"q_norm.weight": (stack.head_dim,), "k_norm.weight": (stack.head_dim,)}
    return [
        *(
            rename(f"{name}.self_attn.{part}", f"{name}.mixer.{part}", shape)
            for part, shape in shapes.items()
        ),
        rename(f"{name}.mlp.gate_proj.weight", f"{name}.mlp.gate_proj.weight", (inner, hidden)),
        rename(f"{name}.mlp.up_proj.weight", f"{name}.mlp.up_proj.weight", (inner, hidden)),
        rename(f"{name}.mlp.down_proj.weight", f"{name}.mlp.down_proj.weight", (hidden, inner)),
        rename(f"{name}.input_layernorm.weight", f"{name}.mixer_norm.weight", (hidden,)),
        rename(f"{name}.post_attention_layernorm.weight", f"{name}.mlp_norm.weight", (hidden,)),
    ]


def _duplicated_head(tokens: str, head: str, shape: Shape) -> TensorMapping:
    """Map a tied head that is stored as well; it must equal the token embedding."""

    def one(table: Tensor, copy: Tensor) -> Tensors:
        import torch

        if not torch.equal(table, copy):
            raise CheckpointError(
                f"config.json ties the head to the token embedding, but {head} and {tokens} differ",
                "set tie_word_embeddings to false if the head was trained by itself",
            )
        return (table,)

    native = {"model.text_embedding.weight": shape}
    return TensorMapping({tokens: shape, head: shape}, native, one, lambda table: (table, table))


def _check_no_sliding_window(section: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` if a layer has sliding-window attention."""
    kinds = section.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise CheckpointError(f"{where}: layer_types is {kinds!r:.60}, expected a list")
        others = sorted({str(kind) for kind in kinds} - {ATTENTION})
        if others:
            raise CheckpointError(
                f"{where}: layer_types has {', '.join(others)}, only {ATTENTION} is supported"
            )
        return
    if not section.get("use_sliding_window"):
        return
    layers = positive_int(section, "num_hidden_layers", where)
    first = section.get("max_window_layers", 0)
    if not isinstance(first, int) or first < layers:
        raise CheckpointError(
            f"{where}: use_sliding_window is true with max_window_layers {first!r:.60} of {layers} "
            "layers, only attention without a window is supported"
        )
