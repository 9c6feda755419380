"""Model architecture as plain values: sizes, stacks, layer types, parameter shapes.

This module imports neither torch nor transformers, so that checkpoints can be described from config
and headers alone. `model.config.HolisticVLMConfig` holds the same fields for transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

ATTENTION = "full_attention"
LINEAR = "linear_attention"
LAYER_TYPES = (ATTENTION, LINEAR)
# Sizes of the language stack that `config.json` repeats under transformers' names.
DERIVED_FIELDS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)

# Small parameters kept in fp32: bf16 would round their updates away.
FP32_PARAMETERS = (
    "A_log",
    "dt_bias",
    "D",
    "mixer_norm",
    "mlp_norm",
    "g_norm",
    "q_norm",
    "k_norm",
    "norm",
)

# SSM states are fp32 in every model dtype.
FP32_BYTES = 4


@dataclass(frozen=True)
class StackConfig:
    """Shape of one of the two stacks of blocks. Heads are H query and K key/value heads of P."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # None, or {"type": "dynamic" | "linear" | "llama3", "factor": float}; "llama3" also has
    # low_freq_factor, high_freq_factor and original_max_position_embeddings.
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 4096
    # Biases of W_Q, W_K, W_V, and of W_O; RMSNorm on each head of q and k, before RoPE.
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the patch embedding and the position of the pixel shuffle.

    `pixel_shuffle` "pre": before the embedding stack, which sees `tokens_per_tile` tokens per tile;
    "post": after it, so that it sees all `patches_per_tile` patches.
    """

    image_size: int
    patch_size: int
    num_channels: int
    downsample_ratio: float
    pixel_shuffle: str
    image_token_id: int

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def merge(self) -> int:
        """Patches along one side of the square that becomes one token."""
        return round(1 / self.downsample_ratio)

    @property
    def patches_per_tile(self) -> int:
        return self.grid**2

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid // self.merge) ** 2


@dataclass(frozen=True)
class MixerConfig:
    """Options of the Mamba-2 mixer; the defaults are the paper's.

    `qk_norm` adds the norm if the stack has none; otherwise the mixer inherits the stack's.
    """

    conv_width: int = 2
    d_skip: bool = False
    qk_norm: bool = False
    rope: bool = False


class ModelShape(Protocol):
    """Fields that determine the tensors of a model: `Architecture` and `HolisticVLMConfig`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def layer_types(self) -> Sequence[str]: ...
    @property
    def embedding(self) -> StackConfig | None: ...
    @property
    def language(self) -> StackConfig: ...
    @property
    def vision_config(self) -> VisionConfig | None: ...
    @property
    def mixer_config(self) -> MixerConfig: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def num_embedding_layers(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    def stack_of(self, layer: int) -> StackConfig: ...


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


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a decoding cache, summed over the layers."""

    kv_cache: int
    conv_state: int
    ssm_state: int


def kv_cache_bytes(stack: StackConfig, batch: int, columns: int, itemsize: int) -> int:
    """Bytes of keys and values of one attention layer, (B, K, `columns`, P) each."""
    return 2 * batch * stack.num_kv_heads * columns * stack.head_dim * itemsize


def cache_bytes(model: ModelShape, batch: int, columns: int, itemsize: int) -> CacheBytes:
    """Count the bytes of a cache after `columns` columns; `itemsize` is that of the model's dtype.

    A Mamba-2 layer holds the last W - 1 inputs of its convolution, (B, Ch, W - 1) in the model's
    dtype, and an SSM state (B, H, P, P) in fp32.
    """
    kv = conv = ssm = 0
    for layer, kind in enumerate(model.layer_types):
        stack = model.stack_of(layer)
        if kind == ATTENTION:
            kv += kv_cache_bytes(stack, batch, columns, itemsize)
        else:
            channels = (stack.num_heads + 2 * stack.num_kv_heads) * stack.head_dim
            conv += batch * channels * (model.mixer_config.conv_width - 1) * itemsize
            ssm += batch * stack.num_heads * stack.head_dim**2 * FP32_BYTES
    return CacheBytes(kv, conv, ssm)


def is_fp32_parameter(name: str) -> bool:
    """Whether a parameter stays fp32 in a model of a narrower dtype."""
    return any(part in FP32_PARAMETERS for part in name.split("."))


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
    for layer, kind in enumerate(model.layer_types):
        stack = model.stack_of(layer)
        mixer = (
            _attention_shapes(stack, hidden)
            if kind == ATTENTION
            else _mamba2_shapes(stack, model.mixer_config, hidden)
        )
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


def _projection_shapes(stack: StackConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    """W_Q, W_K, W_V and W_O, with their biases."""
    wide, narrow = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    rows = {"q_proj": (wide, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in rows.items():
        shapes[f"{name}.weight"] = shape
        if stack.qkv_bias:
            shapes[f"{name}.bias"] = shape[:1]
    shapes["o_proj.weight"] = (hidden, wide)
    if stack.output_bias:
        shapes["o_proj.bias"] = (hidden,)
    return shapes


def _qk_norm_shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
    return {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}


def _attention_shapes(stack: StackConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    norms = _qk_norm_shapes(stack.head_dim) if stack.qk_norm else {}
    return {**_projection_shapes(stack, hidden), **norms}


def _mamba2_shapes(
    stack: StackConfig, options: MixerConfig, hidden: int
) -> dict[str, tuple[int, ...]]:
    heads, wide = stack.num_heads, stack.num_heads * stack.head_dim
    channels = wide + 2 * stack.num_kv_heads * stack.head_dim
    shapes: dict[str, tuple[int, ...]] = {"A_log": (heads,), "dt_bias": (heads,)}
    if options.d_skip:
        shapes["D"] = (heads,)
    shapes |= _projection_shapes(stack, hidden)
    shapes["g_proj.weight"] = (wide, hidden)
    shapes["dt_proj.weight"] = (heads, hidden)
    shapes["conv1d.weight"] = (channels, 1, options.conv_width)
    shapes["conv1d.bias"] = (channels,)
    shapes["g_norm.weight"] = (stack.head_dim,)
    if options.qk_norm or stack.qk_norm:
        shapes |= _qk_norm_shapes(stack.head_dim)
    return shapes
