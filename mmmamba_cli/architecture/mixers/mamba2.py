"""Mamba-2 (arXiv 2405.21060) in place of attention, as in mmMamba (arXiv 2502.13145)."""

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
    vectors: Shapes = {"A_log": heads, "dt_bias": heads}
    if options.d_skip:
        vectors["D"] = heads
    gates: Shapes = {"dt_proj.weight": (stack.num_heads, hidden)}
    return gated_shapes(stack, options, hidden, vectors, gates)


SPEC = register_spec(
    MixerSpec(
        name="mamba2",
        title="Mamba-2",
        layer_type=LINEAR,
        parameter_shapes=parameter_shapes,
        cache_bytes=matrix_state_bytes,
        operations=matrix_state_operations,
        options=(*GATED_OPTIONS, "d_skip", "input_step"),
        matrix_parameters=(
            "q_proj",
            "k_proj",
            "dt_proj",
            "conv1d",
            "tile_taps",
            "A_log",
            "dt_bias",
            "q_norm",
            "k_norm",
        ),
        partial_matrix_parameters=("conv1d", "tile_taps"),
        fp32_parameters=frozenset({"A_log", "dt_bias", "D", "g_norm", "tile_taps"}),
        decay_parameters=frozenset({"A_log", "dt_bias"}),
        is_default=True,
        is_packed=lambda options: options.input_step,
    )
)
