"""The HoVLE layout (`model_type: internvl_chat`): its config and its name map."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from mmmamba_cli.architecture import ATTENTION, Architecture, ModelShape
from mmmamba_cli.checkpoint.config_fields import (
    positive_float,
    positive_int,
    require_value,
    stack_fields,
    token_ids,
)
from mmmamba_cli.checkpoint.name_map import Shape, TensorMapping, packed_qkv, rename, stacked_rows
from mmmamba_cli.errors import CheckpointError

if TYPE_CHECKING:
    from mmmamba_cli.model import HolisticVLMConfig

MODEL_TYPE = "internvl_chat"
EMBEDDING_TYPE = "holistic_embedding"

# Configs for bare state dicts, by the name that `--arch` takes. Tensor shapes cannot confirm the
# fields in `ASSUMED_FIELDS`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "hovle-2.6b": {
        "model_type": MODEL_TYPE,
        "downsample_ratio": 0.5,
        "force_image_size": 448,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "normalize_encoder_output": False,
        "template": "internlm2-chat",
        "embedding_config": {
            "model_type": EMBEDDING_TYPE,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_hidden_layers": 8,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "image_size": 448,
            "patch_size": 14,
            "num_channels": 3,
            "img_context_token_id": 92546,
            "llm_vocab_size": 92553,
            "llm_hidden_size": 2048,
            "pixel_shuffle_loc": "pre",
            "special_token_maps": {},
        },
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_hidden_layers": 24,
            "vocab_size": 92553,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
    }
}

ASSUMED_FIELDS = (
    "normalize_encoder_output",
    "embedding_config.pixel_shuffle_loc",
    "embedding_config.rope_theta",
    "embedding_config.rope_scaling",
    "embedding_config.max_position_embeddings",
    "embedding_config.img_context_token_id",
)

# (foreign prefix, native prefix, config, layer index) -> mappings of one layer.
BlockMapping = Callable[[str, str, ModelShape, int], list[TensorMapping]]

# Stop tokens of the chat template in InternLM2's vocabulary; they need the full vocabulary.
CHAT_STOP_IDS = (2, 1163, 92543, 92542)


def to_config(raw: Mapping[str, Any], where: str = "config.json") -> HolisticVLMConfig:
    """Convert HoVLE's config to the model's. Raises `CheckpointError`."""
    from mmmamba_cli.checkpoint.native_config import to_model_config

    return to_model_config(to_architecture(raw, where))


def to_architecture(
    raw: Mapping[str, Any], where: str = "config.json", embedding_type: str = EMBEDDING_TYPE
) -> Architecture:
    """Convert HoVLE's config; all layers are attention. Raises `CheckpointError`.

    `embedding_type` is the `model_type` of the embedding stack, which derived layouts change.
    """
    embedding = _section(raw, "embedding_config", where)
    language = _section(raw, "llm_config", where)
    kind = embedding.get("model_type", embedding_type)
    if kind != embedding_type:
        raise CheckpointError(
            f"{where}: embedding_config.model_type is {kind!r}, known is {embedding_type!r}"
        )
    _check_supported(embedding, language, where)
    first = stack_fields(embedding, where, "embedding_config")
    second = stack_fields(language, where, "llm_config")
    hidden = positive_int(language, "hidden_size", where, "llm_config")
    if positive_int(embedding, "hidden_size", where, "embedding_config") != hidden:
        raise CheckpointError(
            f"{where}: embedding_config.hidden_size is {embedding['hidden_size']} and "
            f"llm_config.hidden_size is {hidden}, expected them equal"
        )
    text_rows = positive_int(embedding, "llm_vocab_size", where, "embedding_config")
    special = embedding.get("special_token_maps") or {}
    if not isinstance(special, dict):
        raise CheckpointError(
            f"{where}: embedding_config.special_token_maps is {special!r:.60}, expected a table"
        )
    positive_int(language, "vocab_size", where, "llm_config")
    return Architecture(
        vocab_size=text_rows + len(special),
        hidden_size=hidden,
        layer_types=[ATTENTION] * (first["num_layers"] + second["num_layers"]),
        embedding_stack=first,
        language_stack=second,
        vision=_vision_fields(raw, embedding, where),
        normalize_embedding_output=bool(raw.get("normalize_encoder_output", False)),
        bos_token_id=token_ids(language, "bos_token_id", where, "llm_config"),
        eos_token_id=token_ids(language, "eos_token_id", where, "llm_config"),
        pad_token_id=token_ids(language, "pad_token_id", where, "llm_config"),
    )


def name_map(
    raw: Mapping[str, Any],
    config: ModelShape,
    names: Collection[str] | None = None,
    block: BlockMapping | None = None,
) -> list[TensorMapping]:
    """The name map of a HoVLE with this config (all layers attention).

    `names` of the tensors in the file show whether a tied head is stored as well. `block` returns
    the mappings of one layer, InternLM2's by default.
    """
    block = block or internlm2_block
    embedding, language = raw["embedding_config"], raw["llm_config"]
    hidden, first = config.hidden_size, config.num_embedding_layers
    table = _embedding_mappings(embedding, config)
    for layer in range(config.num_hidden_layers):
        foreign = (
            f"embedding_model.encoder.{layer}"
            if layer < first
            else f"language_model.model.layers.{layer - first}"
        )
        table += block(foreign, f"model.layers.{layer}", config, layer)
    vocabulary = (int(language["vocab_size"]), hidden)
    tokens = "language_model.model.tok_embeddings.weight"
    kept, head = "unused.language_token_embedding.weight", "language_model.output.weight"
    table.append(rename("language_model.model.norm.weight", "model.norm.weight", (hidden,)))
    if is_tied(raw) and names is not None and head not in names:
        table.append(_tied_head_mapping(tokens, kept, vocabulary))
    else:
        table.append(rename(tokens, kept, vocabulary))
        table.append(rename(head, "lm_head.weight", vocabulary))
    return table


def is_tied(raw: Mapping[str, Any]) -> bool:
    """Whether the head is tied to the language model's token embedding, as `llm_config` says."""
    return bool(raw["llm_config"].get("tie_word_embeddings", False))


def _tied_head_mapping(tokens: str, kept: str, shape: Shape) -> TensorMapping:
    """Map the language model's token embedding to itself and to the head."""
    return TensorMapping(
        {tokens: shape},
        {kept: shape, "lm_head.weight": shape},
        lambda table: (table, table),
        lambda table, head: (head,),
    )


def _embedding_mappings(embedding: Mapping[str, Any], config: ModelShape) -> list[TensorMapping]:
    """Mappings of the patch, position and text embeddings."""
    vision, hidden = config.vision_config, config.hidden_size
    assert vision is not None
    source, native = "embedding_model.vision_embeddings", "model.vision"
    patch = (hidden, vision.num_channels, vision.patch_size, vision.patch_size)
    positions = (1, vision.grid**2 + 1, hidden)
    table = [
        rename(f"{source}.class_embedding", "unused.class_embedding", (1, 1, hidden)),
        rename(f"{source}.position_embedding", f"{native}.position_embedding", positions),
        rename(f"{source}.patch_embedding.weight", f"{native}.patch_embedding.weight", patch),
        rename(f"{source}.patch_embedding.bias", f"{native}.patch_embedding.bias", (hidden,)),
    ]
    merged = hidden * vision.merge**2
    for index, width in ((0, merged), (2, hidden)):
        old, new = f"embedding_model.pixel_shuffle_proj.{index}", f"{native}.projector.{index}"
        table.append(rename(f"{old}.weight", f"{new}.weight", (hidden, width)))
        table.append(rename(f"{old}.bias", f"{new}.bias", (hidden,)))
    text: dict[str, tuple[int, ...]] = {
        "embedding_model.llm_text_embeddings.weight": (int(embedding["llm_vocab_size"]), hidden)
    }
    special = len(embedding.get("special_token_maps") or {})
    if special:
        text["embedding_model.special_text_embeddings.weight"] = (special, hidden)
    table.append(stacked_rows(text, "model.text_embedding.weight"))
    return table


def internlm2_block(
    foreign: str, native: str, config: ModelShape, layer: int
) -> list[TensorMapping]:
    """The seven tensors of one attention layer under InternLM2's names."""
    stack, hidden = config.stack_of(layer), config.hidden_size
    wide, inner = stack.num_heads * stack.head_dim, stack.intermediate_size
    qkv = [f"{native}.mixer.{name}_proj.weight" for name in "qkv"]
    return [
        packed_qkv(
            f"{foreign}.attention.wqkv.weight",
            qkv,
            stack.num_heads,
            stack.num_kv_heads,
            stack.head_dim,
            hidden,
        ),
        rename(f"{foreign}.attention.wo.weight", f"{native}.mixer.o_proj.weight", (hidden, wide)),
        *mlp_and_norms(foreign, native, hidden, inner),
    ]


def mlp_and_norms(foreign: str, native: str, hidden: int, inner: int) -> list[TensorMapping]:
    """Mappings of a layer's SwiGLU and its two norms."""
    feed, mlp = f"{foreign}.feed_forward", f"{native}.mlp"
    return [
        rename(f"{feed}.w1.weight", f"{mlp}.gate_proj.weight", (inner, hidden)),
        rename(f"{feed}.w2.weight", f"{mlp}.down_proj.weight", (hidden, inner)),
        rename(f"{feed}.w3.weight", f"{mlp}.up_proj.weight", (inner, hidden)),
        rename(f"{foreign}.attention_norm.weight", f"{native}.mixer_norm.weight", (hidden,)),
        rename(f"{foreign}.ffn_norm.weight", f"{native}.mlp_norm.weight", (hidden,)),
    ]


def _section(raw: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = raw.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: {name} is missing, expected HoVLE's two sub-configs")
    return section


def _vision_fields(
    raw: Mapping[str, Any], embedding: Mapping[str, Any], where: str
) -> dict[str, Any]:
    name = "embedding_config"
    place = embedding.get("pixel_shuffle_loc", "pre")
    if place not in ("pre", "post"):
        raise CheckpointError(
            f"{where}: {name}.pixel_shuffle_loc is {place!r}, known are 'pre' and 'post'"
        )
    ratio = positive_float(
        {"downsample_ratio": 0.5, **raw, **embedding}, "downsample_ratio", None, where
    )
    image = positive_int(embedding, "image_size", where, name)
    patch = positive_int(embedding, "patch_size", where, name)
    merge = round(1 / ratio) if ratio * image >= 1 else 0
    if merge < 1 or merge * ratio != 1 or image % (patch * merge):
        raise CheckpointError(
            f"{where}: image_size {image}, patch_size {patch} and downsample_ratio {ratio!r} do "
            "not give whole squares of patches"
        )
    return {
        "image_size": image,
        "patch_size": patch,
        "num_channels": positive_int({"num_channels": 3, **embedding}, "num_channels", where, name),
        "downsample_ratio": float(ratio),
        "pixel_shuffle": place,
        "image_token_id": positive_int(embedding, "img_context_token_id", where, name),
    }


def _check_supported(embedding: Mapping[str, Any], language: Mapping[str, Any], where: str) -> None:
    """Raise for options that change the computation and that the model does not support."""
    wanted = (
        ("embedding_config", embedding, "attention_bias", False),
        ("embedding_config", embedding, "mlp_bias", False),
        ("embedding_config", embedding, "use_ls", False),
        ("embedding_config", embedding, "use_pixel_shuffle_proj", True),
        ("embedding_config", embedding, "hidden_act", "silu"),
        ("llm_config", language, "bias", False),
        ("llm_config", language, "hidden_act", "silu"),
    )
    for name, section, key, value in wanted:
        require_value(section, key, value, where, name)
