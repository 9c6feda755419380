"""Sizes of stacks, tiles and mixers, and of a decoding cache, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

ATTENTION = "full_attention"
LINEAR = "linear_attention"
LAYER_TYPES = (ATTENTION, LINEAR)
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


# Values of `MixerConfig.tile_layers`.
EMBEDDING_LAYERS, ALL_LAYERS = "embedding", "all"
TILE_LAYERS = (EMBEDDING_LAYERS, ALL_LAYERS)

# Least and largest values of the options that are numbers.
OPTION_RANGES = {"conv_width": (1, 16), "window": (1, 1 << 20), "sinks": (0, 1 << 16)}

# Options of the first release.
FIRST_OPTIONS = ("conv_width", "d_skip", "qk_norm", "rope")


@dataclass(frozen=True)
class MixerConfig:
    """Options of the mixers that replace attention; the defaults are mmMamba's.

    Each mixer reads some of them (`MixerSpec.options`). `qk_norm` adds the norm if the stack has
    none; otherwise the mixer inherits the stack's.
    """

    conv_width: int = 2
    d_skip: bool = False
    qk_norm: bool = False
    rope: bool = False
    # False: what is written to the state is not scaled by the step size.
    input_step: bool = True
    # Columns that a window sees, the query's own included, and the first columns that it always
    # sees, or a learned logit per head in the softmax's denominator.
    window: int = 256
    sinks: int = 0
    sink_logits: bool = False
    # Taps of the convolution on the columns above-left, above and above-right inside a tile, and
    # the layers that have them: those of the embedding stack, or all.
    tile_taps: bool = False
    tile_layers: str = EMBEDDING_LAYERS

    def stored(self) -> dict[str, Any]:
        """The options as `config.json` stores them.

        Options that release 0.1 does not know are stored only if they differ from their default.
        """
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name in FIRST_OPTIONS or getattr(self, one.name) != one.default
        }


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a decoding cache, of one layer or summed over layers."""

    kv_cache: int = 0
    conv_state: int = 0
    ssm_state: int = 0

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(
            self.kv_cache + other.kv_cache,
            self.conv_state + other.conv_state,
            self.ssm_state + other.ssm_state,
        )


def kv_cache_bytes(stack: StackConfig, batch: int, columns: int, itemsize: int) -> int:
    """Bytes of keys and values of one attention layer, (B, K, `columns`, P) each."""
    return 2 * batch * stack.num_kv_heads * columns * stack.head_dim * itemsize
