"""Kimi delta attention (arXiv 2510.26692) in place of attention."""

from __future__ import annotations

from mmmamba_cli.architecture.gated import (
    GATED_OPTIONS,
    Shapes,
    gated_shapes,
    matrix_state_bytes,
    matrix_state_operations,
)
from mmmamba_cli.architecture.mixer_spec import MixerSpec, register_spec
from mmmamba_cli.architecture.sizes import LINEAR, MixerConfig, StackConfig


def parameter_shapes(stack: StackConfig, options: MixerConfig, hidden: int) -> Shapes:
    heads, width = stack.num_heads, stack.head_dim
    vectors: Shapes = {"A_log": (heads,), "dt_bias": (heads, width), "beta_bias": (heads,)}
    gates: Shapes = {
        "dt_down_proj.weight": (width, hidden),
        "dt_up_proj.weight": (heads * width, width),
        "beta_proj.weight": (heads, hidden),
    }
    return gated_shapes(stack, options, hidden, vectors, gates)


def operations(stack: StackConfig, options: MixerConfig, columns: int, context: int) -> int:
    """As other matrix states, and one more read-out per column: what the state holds for a key."""
    return matrix_state_operations(stack, options, columns, context) * 3 // 2


SPEC = register_spec(
    MixerSpec(
        name="kda",
        title="Kimi delta attention",
        layer_type=LINEAR,
        parameter_shapes=parameter_shapes,
        cache_bytes=matrix_state_bytes,
        operations=operations,
        options=GATED_OPTIONS,
        matrix_parameters=(
            "q_proj",
            "k_proj",
            "dt_down_proj",
            "dt_up_proj",
            "beta_proj",
            "conv1d",
            "tile_taps",
            "A_log",
            "dt_bias",
            "beta_bias",
            "q_norm",
            "k_norm",
        ),
        partial_matrix_parameters=("conv1d", "tile_taps"),
        fp32_parameters=frozenset({"A_log", "dt_bias", "beta_bias", "g_norm", "tile_taps"}),
        decay_parameters=frozenset({"A_log", "dt_bias"}),
    )
)
