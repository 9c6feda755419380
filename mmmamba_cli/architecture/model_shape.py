"""Model architecture as plain values: stacks, layer types and mixers.

This package imports neither torch nor transformers, so that checkpoints can be described from
config and headers alone. `model.config.HolisticVLMConfig` holds the same fields for transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from mmmamba_cli.architecture.mixer_spec import MixerSpec, default_mixer, join_and, mixer_spec
from mmmamba_cli.architecture.sizes import (
    ATTENTION,
    EMBEDDING_LAYERS,
    MixerConfig,
    StackConfig,
    VisionConfig,
)

# Sizes of the language stack that `config.json` repeats under transformers' names.
DERIVED_FIELDS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)


class MixerShape(Protocol):
    """Fields that determine a mixer: of `ModelShape`, or of a single stack (`TextStack`)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def mixer_config(self) -> MixerConfig: ...
    @property
    def num_embedding_layers(self) -> int: ...
    def stack_of(self, layer: int) -> StackConfig: ...


@dataclass(frozen=True)
class TextStack:
    """The mixers' shape of a model of one stack, whose other parts are not ours.

    `stack` has the sizes of the layer that asks, since layers of one model may differ in them.
    """

    hidden_size: int
    stack: StackConfig
    mixer_config: MixerConfig

    @property
    def num_embedding_layers(self) -> int:
        return 0

    def stack_of(self, layer: int) -> StackConfig:
        return self.stack


class ModelShape(MixerShape, Protocol):
    """Fields that determine the tensors of a model: `Architecture` and `HolisticVLMConfig`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def layer_types(self) -> Sequence[str]: ...
    @property
    def mixer_names(self) -> Sequence[str]: ...
    @property
    def embedding(self) -> StackConfig | None: ...
    @property
    def language(self) -> StackConfig: ...
    @property
    def vision_config(self) -> VisionConfig | None: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def num_hidden_layers(self) -> int: ...


@dataclass(frozen=True)
class Architecture:
    """Config fields that a checkpoint of any layout provides.

    Nested values are plain JSON, as in `config.json`; `embedding`, `language`, `vision_config` and
    `mixer_config` are their typed views. `values` are the fields to build a config from.
    """

    vocab_size: int
    hidden_size: int
    layer_types: Sequence[str]
    language_stack: Mapping[str, Any]
    embedding_stack: Mapping[str, Any] | None = None
    vision: Mapping[str, Any] | None = None
    mixer: Mapping[str, Any] = field(default_factory=dict)
    # The mixer of each layer; None for the default of each layer type.
    mixers: Sequence[str] | None = None
    normalize_embedding_output: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None

    @classmethod
    def from_config(cls, config: Any) -> Architecture:
        """The architecture of a `HolisticVLMConfig`."""
        return cls(**{one.name: getattr(config, one.name) for one in fields(cls)})

    @property
    def values(self) -> dict[str, Any]:
        """All fields by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def embedding(self) -> StackConfig | None:
        return None if self.embedding_stack is None else StackConfig(**self.embedding_stack)

    @property
    def language(self) -> StackConfig:
        return StackConfig(**self.language_stack)

    @property
    def vision_config(self) -> VisionConfig | None:
        return None if self.vision is None else VisionConfig(**self.vision)

    @property
    def mixer_config(self) -> MixerConfig:
        return MixerConfig(**self.mixer)

    @property
    def mixer_names(self) -> tuple[str, ...]:
        return resolve_mixers(self.layer_types, self.mixers)

    @property
    def num_embedding_layers(self) -> int:
        return 0 if self.embedding is None else self.embedding.num_layers

    @property
    def num_hidden_layers(self) -> int:
        return self.num_embedding_layers + self.language.num_layers

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == ATTENTION)

    def stack_of(self, layer: int) -> StackConfig:
        """The stack of layer `layer`, counted through both."""
        if self.embedding is not None and layer < self.embedding.num_layers:
            return self.embedding
        return self.language


def resolve_mixers(layer_types: Sequence[str], mixers: Sequence[str] | None) -> tuple[str, ...]:
    """The mixer of each layer; None means the default of each layer type."""
    if mixers is not None:
        return tuple(mixers)
    return tuple(default_mixer(kind) for kind in layer_types)


def normalize_mixers(layer_types: Sequence[str], mixers: Sequence[str] | None) -> list[str] | None:
    """`mixers` as a config stores them: None if every layer has the default of its type."""
    if mixers is None or tuple(mixers) == resolve_mixers(layer_types, None):
        return None
    return list(mixers)


def layer_options(model: MixerShape, layer: int) -> MixerConfig:
    """The mixer's options in layer `layer`: no `tile_taps` where `tile_layers` leaves it out."""
    options = model.mixer_config
    if options.tile_layers == EMBEDDING_LAYERS and layer >= model.num_embedding_layers:
        return replace(options, tile_taps=False)
    return options


def spec_of(model: ModelShape, layer: int) -> MixerSpec:
    """The mixer of layer `layer`, counted through both stacks."""
    return mixer_spec(model.mixer_names[layer])


def slow_decoding_reason(model: ModelShape) -> str | None:
    """Why the generator does not decode a model, which `generate` decodes; None if it does."""
    specs = dict.fromkeys(map(mixer_spec, model.mixer_names))
    titles = [spec.slow_title(model.mixer_config) for spec in specs]
    slow = [title for title in titles if title is not None]
    if not slow:
        return None
    return f"{join_and(slow)} {'has' if len(slow) == 1 else 'have'} no fast decoding"


def derived_fields(model: ModelShape) -> dict[str, int]:
    """Values of `DERIVED_FIELDS`: layers of both stacks, other sizes of the language stack."""
    stack = model.language
    sizes = (
        model.num_hidden_layers,
        stack.num_heads,
        stack.num_kv_heads,
        stack.head_dim,
        stack.intermediate_size,
        stack.max_position_embeddings,
    )
    return dict(zip(DERIVED_FIELDS, sizes, strict=True))
