"""Configuration of teacher, hybrid and student, which differ in `layer_types`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mmmamba_cli.architecture import (
    ATTENTION,
    DERIVED_FIELDS,
    LAYER_TYPES,
    MixerConfig,
    StackConfig,
    VisionConfig,
    derived_fields,
    mixers_problem,
    normalize_mixers,
    options_problem,
    resolve_mixers,
    tile_options_problem,
)
from mmmamba_cli.versions import require_versions

# Repeated here for exported code, which does not import `mmmamba_cli.model`.
require_versions()

# Config fields that a student takes from its teacher unchanged.
INHERITED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "embedding",
    "language",
    "vision",
    "normalize_embedding_output",
)


# A constant, since torch.compile does not trace `fields` of a class.
VISION_FIELDS = tuple(one.name for one in fields(VisionConfig))


class HolisticVisionConfig(PreTrainedConfig):
    """The fields and sizes of `VisionConfig` as a transformers sub-config.

    The section `vision` of `config.json` holds these fields and no others.
    """

    model_type: ClassVar[str] = "mmmamba_vision"
    base_config_key: ClassVar[str] = "vision"
    # Older releases of transformers write the difference from a config of defaults.
    has_no_defaults_at_init: ClassVar[bool] = True

    image_size: int
    patch_size: int
    num_channels: int
    downsample_ratio: float
    pixel_shuffle: str
    image_token_id: int

    @property
    def typed(self) -> VisionConfig:
        return VisionConfig(**{name: getattr(self, name) for name in VISION_FIELDS})

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.typed.grid

    @property
    def merge(self) -> int:
        """Patches along one side of the square that becomes one token."""
        return self.typed.merge

    @property
    def patches_per_tile(self) -> int:
        return self.typed.patches_per_tile

    @property
    def tokens_per_tile(self) -> int:
        return self.typed.tokens_per_tile


class HolisticVLMConfig(PreTrainedConfig):
    """Config of a decoder-only vision-language model of two stacks of the same block.

    The embedding stack reads image patches and text together; the language stack follows it. Layers
    are counted through both stacks, embedding stack first. `layer_types[i]` is "full_attention" or
    "linear_attention", from which transformers builds its caches; `mixers[i]` names what the layer
    computes, and None means the default of each layer type (`mixer_names`). `embedding_stack` and
    `vision_config` are None for a plain language model. The stacks and `mixer` are dicts, so that
    the config is plain JSON; `embedding`, `language` and `mixer_config` are their typed views.

    `config.json` stores `vision_config` as `vision`. It also stores the sizes in `DERIVED_FIELDS`
    for other programs. They follow from the stacks; a contradiction raises `ValueError`.
    """

    model_type: ClassVar[str] = "mmmamba"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "vision_config": HolisticVisionConfig
    }

    vocab_size: int = 0
    hidden_size: int = 0
    layer_types: list[str] = field(default_factory=list)
    embedding_stack: dict[str, Any] | None = None
    language_stack: dict[str, Any] | None = None
    vision_config: Any = None
    mixer: dict[str, Any] = field(default_factory=dict)
    mixers: list[str] | None = None
    normalize_embedding_output: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        section = kwargs.pop("vision", None)
        if section is not None and self.vision_config is not None:
            raise ValueError("vision and vision_config are the same section: give one of them")
        if section is not None:
            self.vision_config = section
        if isinstance(self.vision_config, Mapping):
            self.vision_config = HolisticVisionConfig(**self.vision_config)
        derived = {name: kwargs.pop(name) for name in DERIVED_FIELDS if name in kwargs}
        super().__post_init__(**kwargs)
        if self.language_stack is not None:
            self._check(derived)

    def _check(self, derived: Mapping[str, Any]) -> None:
        expected = self.num_hidden_layers
        if len(self.layer_types) != expected:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, "
                f"the stacks have {expected} layers"
            )
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types[{index}] is {kind!r}, allowed are {LAYER_TYPES}")
        problem = (
            options_problem(self.mixer_config)
            or mixers_problem(self.layer_types, self.mixers, self.mixer_config)
            or tile_options_problem(self)
        )
        if problem is not None:
            raise ValueError(problem)
        self.mixers = normalize_mixers(self.layer_types, self.mixers)
        for name, value in derived.items():
            if value != getattr(self, name):
                raise ValueError(
                    f"{name} is {value!r}, but it follows from the stacks, which give "
                    f"{getattr(self, name)}"
                )

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        if self.vision_config is not None:
            output["vision"] = self.vision
        output.pop("vision_config", None)
        if output.get("mixers") is None:
            output.pop("mixers", None)
        if self.language_stack is not None:
            output |= derived_fields(self)
        return output

    @property
    def embedding(self) -> StackConfig | None:
        return None if self.embedding_stack is None else StackConfig(**self.embedding_stack)

    @property
    def language(self) -> StackConfig:
        if self.language_stack is None:
            raise ValueError("this config has no language_stack")
        return StackConfig(**self.language_stack)

    @property
    def vision(self) -> dict[str, Any] | None:
        """`vision_config` as stored in `config.json`."""
        vision = self.vision_config
        return None if vision is None else asdict(vision.typed)

    @vision.setter
    def vision(self, value: Mapping[str, Any] | None) -> None:
        self.vision_config = None if value is None else HolisticVisionConfig(**value)

    @property
    def mixer_config(self) -> MixerConfig:
        return MixerConfig(**self.mixer)

    @property
    def mixer_names(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        return resolve_mixers(self.layer_types, self.mixers)

    @property
    def num_embedding_layers(self) -> int:
        return 0 if self.embedding is None else self.embedding.num_layers

    def stack_of(self, layer: int) -> StackConfig:
        """The stack of layer `layer`, counted through both."""
        if self.embedding is not None and layer < self.embedding.num_layers:
            return self.embedding
        return self.language

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == ATTENTION)

    @property
    def image_token_id(self) -> int | None:
        return None if self.vision_config is None else self.vision_config.image_token_id

    # Sizes under the names that transformers and other programs read: those of the language stack,
    # except for `num_hidden_layers`, which counts both stacks.
    @property
    def num_hidden_layers(self) -> int:
        return self.num_embedding_layers + self.language.num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.language.num_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.language.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.language.head_dim

    @property
    def intermediate_size(self) -> int:
        return self.language.intermediate_size

    @property
    def max_position_embeddings(self) -> int:
        return self.language.max_position_embeddings
