"""Configuration of the one model class; `layer_types` tells teacher, hybrid and student apart."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mmmamba_cli.architecture import (
    ATTENTION,
    LAYER_TYPES,
    MixerConfig,
    StackConfig,
    VisionConfig,
)


class HolisticVLMConfig(PreTrainedConfig):
    """A decoder-only vision-language model of two stacks of the same block.

    The embedding stack reads image patches and text together; the language stack follows it. Layers
    are counted through both, embedding stack first, and `layer_types[i]` says which mixer layer i
    has: "full_attention" or "linear_attention" (Mamba-2). `embedding_stack` is None, and `vision`
    too, for a plain language model. The nested values are dicts so that the config is plain JSON;
    `embedding`, `language`, `vision_config` and `mixer_config` are their typed views.
    """

    model_type: ClassVar[str] = "mmmamba"

    vocab_size: int = 0
    hidden_size: int = 0
    layer_types: list[str] = field(default_factory=list)
    embedding_stack: dict[str, Any] | None = None
    language_stack: dict[str, Any] | None = None
    vision: dict[str, Any] | None = None
    mixer: dict[str, Any] = field(default_factory=dict)
    normalize_embedding_output: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.language_stack is not None:
            self._check()

    def _check(self) -> None:
        expected = self.num_hidden_layers
        if len(self.layer_types) != expected:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, "
                f"the stacks have {expected} layers"
            )
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types[{index}] is {kind!r}, allowed are {LAYER_TYPES}")

    @property
    def embedding(self) -> StackConfig | None:
        return None if self.embedding_stack is None else StackConfig(**self.embedding_stack)

    @property
    def language(self) -> StackConfig:
        if self.language_stack is None:
            raise ValueError("this config has no language_stack")
        return StackConfig(**self.language_stack)

    @property
    def vision_config(self) -> VisionConfig | None:
        return None if self.vision is None else VisionConfig(**self.vision)

    @property
    def mixer_config(self) -> MixerConfig:
        return MixerConfig(**self.mixer)

    @property
    def num_embedding_layers(self) -> int:
        return 0 if self.embedding is None else self.embedding.num_layers

    def stack_of(self, layer: int) -> StackConfig:
        """The stack that layer `layer`, counted through both, belongs to."""
        if self.embedding is not None and layer < self.embedding.num_layers:
            return self.embedding
        return self.language

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == ATTENTION)

    # Names under which transformers' caches and generation look for shapes.
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
    def max_position_embeddings(self) -> int:
        return self.language.max_position_embeddings
