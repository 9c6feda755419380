"""Gated linear attention (arXiv 2312.06635) in place of attention."""

from __future__ import annotations

from mmmamba_cli.architecture.gated_sizes import (
    Shapes,
    gated_shapes,
    gated_spec,
    matrix_state_operations,
)
from mmmamba_cli.architecture.mixer_spec import register_spec
from mmmamba_cli.architecture.sizes import MixerConfig, StackConfig

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
    gated_spec(
        "gla",
        "gated linear attention",
        parameter_shapes,
        matrix_state_operations,
        projections=("decay_down_proj", "decay_up_proj"),
        decay=("decay_bias",),
    )
)
