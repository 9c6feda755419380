"""Kimi delta attention (arXiv 2510.26692) in place of attention."""

from __future__ import annotations

from mmmamba_cli.architecture.gated_sizes import (
    Shapes,
    delta_state_operations,
    gated_shapes,
    gated_spec,
)
from mmmamba_cli.architecture.mixer_spec import register_spec
from mmmamba_cli.architecture.sizes import MixerConfig, StackConfig


def parameter_shapes(stack: StackConfig, options: MixerConfig, hidden: int) -> Shapes:
    heads, width = stack.num_heads, stack.head_dim
    vectors: Shapes = {"A_log": (heads,), "dt_bias": (heads, width), "beta_bias": (heads,)}
    gates: Shapes = {
        "dt_down_proj.weight": (width, hidden),
        "dt_up_proj.weight": (heads * width, width),
        "beta_proj.weight": (heads, hidden),
    }
    return gated_shapes(stack, options, hidden, vectors, gates)


SPEC = register_spec(
    gated_spec(
        "kda",
        "Kimi delta attention",
        parameter_shapes,
        delta_state_operations,
        projections=("dt_down_proj", "dt_up_proj", "beta_proj"),
        decay=("A_log", "dt_bias"),
        write=("beta_bias",),
        keeps_writes=False,
    )
)
