"""Gated DeltaNet (arXiv 2412.06464) in place of attention."""

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
    heads = (stack.num_heads,)
    vectors: Shapes = {"A_log": heads, "dt_bias": heads, "beta_bias": heads}
    gates: Shapes = {
        "dt_proj.weight": (stack.num_heads, hidden),
        "beta_proj.weight": (stack.num_heads, hidden),
    }
    return gated_shapes(stack, options, hidden, vectors, gates)


def operations(stack: StackConfig, options: MixerConfig, columns: int, context: int) -> int:
    """As other matrix states, and one more read-out per column: what the state holds for a key."""
    return matrix_state_operations(stack, options, columns, context) * 3 // 2


SPEC = register_spec(
    MixerSpec(
        name="gated_delta",
        title="Gated DeltaNet",
        layer_type=LINEAR,
        parameter_shapes=parameter_shapes,
        cache_bytes=matrix_state_bytes,
        operations=operations,
        options=GATED_OPTIONS,
        matrix_parameters=(
            "q_proj",
            "k_proj",
            "dt_proj",
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
        is_packed=lambda options: True,
    )
)
