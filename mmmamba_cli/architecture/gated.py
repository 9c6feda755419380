"""Sizes common to the recurrent mixers with a convolution, a gate and a gated norm."""

from __future__ import annotations

from mmmamba_cli.architecture.projections import projection_shapes, qk_norm_shapes
from mmmamba_cli.architecture.sizes import FP32_BYTES, CacheBytes, MixerConfig, StackConfig

Shapes = dict[str, tuple[int, ...]]

# Options that all of these mixers read.
GATED_OPTIONS = ("conv_width", "qk_norm", "rope", "tile_taps", "tile_layers")


def gated_shapes(
    stack: StackConfig, options: MixerConfig, hidden: int, vectors: Shapes, gates: Shapes
) -> Shapes:
    """Parameter shapes in `state_dict` order; `options` are those of the layer.

    `vectors` are the mixer's own parameters outside of modules; `gates` are its projections, which
    follow the output gate.
    """
    wide = stack.num_heads * stack.head_dim
    channels = conv_channels(stack)
    if options.tile_taps:
        vectors = {**vectors, "tile_taps": (3, channels)}
    shapes = {**vectors, **projection_shapes(stack, hidden), "g_proj.weight": (wide, hidden)}
    shapes |= gates
    shapes["conv1d.weight"] = (channels, 1, options.conv_width)
    shapes["conv1d.bias"] = (channels,)
    shapes["g_norm.weight"] = (stack.head_dim,)
    if options.qk_norm or stack.qk_norm:
        shapes |= qk_norm_shapes(stack.head_dim)
    return shapes


def conv_channels(stack: StackConfig) -> int:
    """Channels of [v, k, q]."""
    return (stack.num_heads + 2 * stack.num_kv_heads) * stack.head_dim


def matrix_state_bytes(
    stack: StackConfig, options: MixerConfig, batch: int, columns: int, itemsize: int
) -> CacheBytes:
    """The last W - 1 inputs of the convolution, and a state (B, H, P, P) in fp32."""
    return CacheBytes(
        conv_state=batch * conv_channels(stack) * (options.conv_width - 1) * itemsize,
        ssm_state=batch * stack.num_heads * stack.head_dim**2 * FP32_BYTES,
    )


def matrix_state_operations(
    stack: StackConfig, options: MixerConfig, columns: int, context: int
) -> int:
    """One update and one read-out of the state per column."""
    return columns * 2 * stack.num_heads * stack.head_dim**2
