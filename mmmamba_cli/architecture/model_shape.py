"""Model architecture as plain values: stacks, layer types, mixers, parameter shapes.

This package imports neither torch nor transformers, so that checkpoints can be described from
config and headers alone. `model.config.HolisticVLMConfig` holds the same fields for transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Protocol

from mmmamba_cli.architecture.mixer_spec import (
    SHARED_FP32_PARAMETERS,
    MixerSpec,
    default_mixer,
    join_and,
    mixer_spec,
    mixer_specs,
)
from mmmamba_cli.architecture.sizes import (
    ATTENTION,
    EMBEDDING_LAYERS,
    OPTION_RANGES,
    TILE_LAYERS,
    CacheBytes,
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


def mixers_problem(
    layer_types: Sequence[str], mixers: Sequence[str] | None, options: MixerConfig
) -> str | None:
    """Why `mixers` do not fit the layer types or the options, as a sentence; None if they do."""
    if mixers is not None and len(mixers) != len(layer_types):
        return f"mixers has {len(mixers)} entries, but there are {len(layer_types)} layers"
    names = resolve_mixers(layer_types, mixers)
    known = mixer_specs()
    for index, (kind, name) in enumerate(zip(layer_types, names, strict=True)):
        if not isinstance(name, str) or name not in known:
            return f"mixers[{index}] is {name!r:.60}, known are {', '.join(known)}"
        if known[name].layer_type != kind:
            return f"mixers[{index}] is {name}, which is no mixer of a {kind} layer"
    used = {known[name] for name in names}
    for option in fields(MixerConfig):
        value = getattr(options, option.name)
        if value != option.default and not any(option.name in spec.options for spec in used):
            titles = join_and(sorted(spec.title for spec in used))
            return f"mixer.{option.name} is {value}, but no layer reads it ({titles})"
    return None


def options_problem(options: MixerConfig) -> str | None:
    """Why a number or a flag among the options is invalid, as a sentence; None if none is."""
    for option in fields(MixerConfig):
        value = getattr(options, option.name)
        expected = None
        if isinstance(option.default, bool):
            if not isinstance(value, bool):
                expected = "true or false"
        elif option.name in OPTION_RANGES:
            low, high = OPTION_RANGES[option.name]
            if type(value) is not int or not low <= value <= high:
                expected = f"a whole number from {low} to {high}"
        if expected is not None:
            return f"mixer.{option.name} is {value!r:.60}, expected {expected}"
    return None


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


def tile_options_problem(model: ModelShape) -> str | None:
    """Why the options of taps inside tiles do not fit the model; None if they do."""
    options = model.mixer_config
    if options.tile_layers not in TILE_LAYERS:
        allowed = " or ".join(TILE_LAYERS)
        return f"mixer.tile_layers is {options.tile_layers!r:.60}, expected {allowed}"
    if options.tile_layers != EMBEDDING_LAYERS and not options.tile_taps:
        return f"mixer.tile_layers is {options.tile_layers}, but mixer.tile_taps is False"
    if options.tile_taps and model.vision_config is None:
        return "mixer.tile_taps is True, but a language model without vision has no tiles"
    if options.tile_taps and options.tile_layers == EMBEDDING_LAYERS and model.embedding is None:
        return "mixer.tile_layers is embedding, but the model has no embedding stack"
    return None


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


def cache_bytes(model: ModelShape, batch: int, columns: int, itemsize: int) -> CacheBytes:
    """Bytes of a cache after `columns` columns; `itemsize` is that of the model's dtype."""
    return sum(layer_cache_bytes(model, batch, columns, itemsize), CacheBytes())


def layer_cache_bytes(
    model: ModelShape, batch: int, columns: int, itemsize: int
) -> tuple[CacheBytes, ...]:
    """Bytes of the cache of each layer; see `cache_bytes`."""
    options = model.mixer_config
    return tuple(
        mixer_spec(name).cache_bytes(model.stack_of(layer), options, batch, columns, itemsize)
        for layer, name in enumerate(model.mixer_names)
    )


@cache
def fp32_parameters() -> frozenset[str]:
    """Parts of names of the small parameters kept in fp32: bf16 would round their updates away."""
    return SHARED_FP32_PARAMETERS.union(*(spec.fp32_parameters for spec in mixer_specs().values()))


def is_fp32_parameter(name: str) -> bool:
    """Whether a parameter stays fp32 in a model of a narrower dtype."""
    return not fp32_parameters().isdisjoint(name.split("."))


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


def parameter_shapes(model: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters in `state_dict` order, without a tied head."""
    hidden = model.hidden_size
    found: dict[str, tuple[int, ...]] = {"model.text_embedding.weight": (model.vocab_size, hidden)}
    if model.vision_config is not None:
        found |= _named("model.vision", _vision_shapes(model.vision_config, hidden))
    for layer, name in enumerate(model.mixer_names):
        stack = model.stack_of(layer)
        mixer = mixer_spec(name).parameter_shapes(stack, layer_options(model, layer), hidden)
        inner = stack.intermediate_size
        block = {
            "mixer_norm.weight": (hidden,),
            **_named("mixer", mixer),
            "mlp_norm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        found |= _named(f"model.layers.{layer}", block)
    found["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        found["lm_head.weight"] = (model.vocab_size, hidden)
    return found


def _named(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _vision_shapes(vision: VisionConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    patch = (hidden, vision.num_channels, vision.patch_size, vision.patch_size)
    return {
        "position_embedding": (1, vision.grid**2 + 1, hidden),
        "patch_embedding.weight": patch,
        "patch_embedding.bias": (hidden,),
        "projector.0.weight": (hidden, hidden * vision.merge**2),
        "projector.0.bias": (hidden,),
        "projector.2.weight": (hidden, hidden),
        "projector.2.bias": (hidden,),
    }
