"""Sizes common to the recurrent mixers with a convolution, a gate and a gated norm."""

from __future__ import annotations

from collections.abc import Callable

from mmmamba_cli.architecture.mixer_spec import DECAY_BOUND, EXACT_DECAY, MixerSpec
from mmmamba_cli.architecture.projections import projection_shapes, qk_norm_shapes
from mmmamba_cli.architecture.sizes import (
    FP32_BYTES,
    LINEAR,
    CacheBytes,
    MixerConfig,
    StackConfig,
)

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


def delta_state_operations(
    stack: StackConfig, options: MixerConfig, columns: int, context: int
) -> int:
    """As other matrix states, and one more read-out per column: what the state holds for a key."""
    return matrix_state_operations(stack, options, columns, context) * 3 // 2


def gated_spec(
    name: str,
    title: str,
    parameter_shapes: Callable[[StackConfig, MixerConfig, int], Shapes],
    operations: Callable[[StackConfig, MixerConfig, int, int], int],
    *,
    projections: tuple[str, ...],
    decay: tuple[str, ...],
    write: tuple[str, ...] = (),
    keeps_writes: bool = True,
) -> MixerSpec:
    """The spec of a recurrent mixer with the common convolution, gate and norm.

    It has no fast decoding. The mixing matrix depends on `projections`, which give the decay and
    the write strength, and on the vectors of both, `decay` and `write`, which stay in fp32. With
    `keeps_writes` nothing but the decay changes what is in the state; a delta rule also removes
    what the state holds for a key.
    """
    inherited = ("q_proj", "k_proj", "q_norm", "k_norm")
    convolution = ("conv1d", "tile_taps")
    return MixerSpec(
        name=name,
        title=title,
        layer_type=LINEAR,
        parameter_shapes=parameter_shapes,
        cache_bytes=matrix_state_bytes,
        operations=operations,
        options=GATED_OPTIONS,
        matrix_parameters=(*inherited, *convolution, *projections, *decay, *write),
        partial_matrix_parameters=convolution,
        fp32_parameters=frozenset({*decay, *write, "g_norm", "tile_taps"}),
        decay_parameters=frozenset(decay),
        decay=EXACT_DECAY if keeps_writes else DECAY_BOUND,
    )
