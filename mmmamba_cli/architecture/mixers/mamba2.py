"""Mamba-2 (arXiv 2405.21060) in place of attention, as in mmMamba (arXiv 2502.13145)."""

from __future__ import annotations

from dataclasses import replace

from mmmamba_cli.architecture.gated_sizes import (
    Shapes,
    gated_shapes,
    gated_spec,
    matrix_state_operations,
)
from mmmamba_cli.architecture.mixer_spec import register_spec
from mmmamba_cli.architecture.sizes import MixerConfig, StackConfig


def parameter_shapes(stack: StackConfig, options: MixerConfig, hidden: int) -> Shapes:
    heads = (stack.num_heads,)
    vectors: Shapes = {"A_log": heads, "dt_bias": heads}
    if options.d_skip:
        vectors["D"] = heads
    gates: Shapes = {"dt_proj.weight": (stack.num_heads, hidden)}
    return gated_shapes(stack, options, hidden, vectors, gates)


MAMBA2 = gated_spec(
    "mamba2",
    "Mamba-2",
    parameter_shapes,
    matrix_state_operations,
    projections=("dt_proj",),
    decay=("A_log", "dt_bias"),
)
SPEC = register_spec(
    replace(
        MAMBA2,
        options=(*MAMBA2.options, "d_skip", "input_step"),
        fp32_parameters=MAMBA2.fp32_parameters | {"D"},
        is_default=True,
        is_packed=lambda options: options.input_step,
        # Without the input step, the step does not scale the read-out.
        is_calibrated=lambda options: options.input_step,
    )
)
