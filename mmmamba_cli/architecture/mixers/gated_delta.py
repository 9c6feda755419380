"""Gated DeltaNet (arXiv 2412.06464) in place of attention."""

from __future__ import annotations

from dataclasses import replace

from mmmamba_cli.architecture.gated_sizes import (
    Shapes,
    delta_state_operations,
    gated_shapes,
    gated_spec,
)
from mmmamba_cli.architecture.mixer_spec import register_spec
from mmmamba_cli.architecture.sizes import MixerConfig, StackConfig


def parameter_shapes(stack: StackConfig, options: MixerConfig, hidden: int) -> Shapes:
    heads = (stack.num_heads,)
    vectors: Shapes = {"A_log": heads, "dt_bias": heads, "beta_bias": heads}
    gates: Shapes = {
        "dt_proj.weight": (stack.num_heads, hidden),
        "beta_proj.weight": (stack.num_heads, hidden),
    }
    return gated_shapes(stack, options, hidden, vectors, gates)


GATED_DELTA = gated_spec(
    "gated_delta",
    "Gated DeltaNet",
    parameter_shapes,
    delta_state_operations,
    projections=("dt_proj", "beta_proj"),
    decay=("A_log", "dt_bias"),
    write=("beta_bias",),
    keeps_writes=False,
)
SPEC = register_spec(replace(GATED_DELTA, is_packed=lambda options: True))
