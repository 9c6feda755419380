"""Gated linear attention (arXiv 2312.06635) in place of attention."""

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

# Rank of the projection of the decays.
DECAY_RANK = 16


def parameter_shapes(stack: StackConfig, options: MixerConfig, hidden: int) -> Shapes:
    heads, width = stack.num_heads, stack.head_dim
    vectors: Shapes = {"decay_bias": (heads, width)}
    gates: Shapes = {
        "decay_down_proj.weight": (DECAY_RANK, hidden),
        "decay_up_proj.weight": (heads * width, DECAY_RANK),
    }
    return gated_shapes(stack, options, hidden, vectors, gates)


SPEC = register_spec(
    MixerSpec(
        name="gla",
        title="gated linear attention",
        layer_type=LINEAR,
        parameter_shapes=parameter_shapes,
        cache_bytes=matrix_state_bytes,
        operations=matrix_state_operations,
        options=GATED_OPTIONS,
        matrix_parameters=(
            "q_proj",
            "k_proj",
            "decay_down_proj",
            "decay_up_proj",
            "conv1d",
            "tile_taps",
            "decay_bias",
            "q_norm",
            "k_norm",
        ),
        partial_matrix_parameters=("conv1d", "tile_taps"),
        fp32_parameters=frozenset({"decay_bias", "g_norm", "tile_taps"}),
        decay_parameters=frozenset({"decay_bias"}),
    )
)
