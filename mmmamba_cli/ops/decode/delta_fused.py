"""Launcher of the decoding kernel of a Gated DeltaNet mixer: one launch."""

from torch import Tensor

from mmmamba_cli.ops.decode import delta_kernels
from mmmamba_cli.ops.decode.delta_step import DeltaWeights
from mmmamba_cli.ops.decode.fused import MIXER_WARPS, check_states, values_per_program
from mmmamba_cli.ops.triton_utils import (
    buffer,
    cdiv,
    check_inputs,
    dense_rows,
    device_guard,
    launch_grid,
    next_power_of_2,
    or_dummy,
    pdl_options,
)


def delta_mixer_step(
    vkq: Tensor,
    gates: Tensor,
    conv_ring: Tensor,
    state: Tensor,
    position: Tensor,
    weights: DeltaWeights,
    *,
    inputs_ready: bool,
) -> Tensor:
    """Shapes as in `ops.delta_mixer_step`; no gradients."""
    check_inputs("delta_mixer_step", vkq, gates, conv_ring, state, *weights)
    check_states("delta_mixer_step", conv_ring, "state", state)
    batch, heads, value_dim, key_dim = state.shape
    channels, taps = weights.conv_weight.shape
    kv_heads = (channels - heads * key_dim) // (value_dim + key_dim)
    vkq, gates = dense_rows(vkq), dense_rows(gates)
    out = buffer(batch, heads, value_dim, like=vkq, dtype=vkq.dtype)
    bias = weights.conv_bias
    values = values_per_program(batch, value_dim)
    # A copy made here is launched too late to count as ready.
    inputs_ready &= all(weight is None or weight.is_contiguous() for weight in weights)
    grid = launch_grid("delta_mixer_step", cdiv(value_dim, values), heads, batch)
    with device_guard(vkq):
        delta_kernels.delta_mixer_step[grid](
            vkq, gates, conv_ring, state, position, out,
            weights.conv_weight.contiguous(), or_dummy(bias, vkq), weights.A.contiguous(),
            weights.dt_bias.contiguous(), weights.beta_bias.contiguous(),
            heads, channels, vkq.stride(0), gates.stride(0), key_dim**-0.5,
            GROUP=heads // kv_heads, P=value_dim, N=key_dim, W=taps, HAS_BIAS=bias is not None,
            BLOCK_P=values, BLOCK_N=next_power_of_2(key_dim), INPUTS_READY=inputs_ready,
            num_warps=MIXER_WARPS, **pdl_options(vkq),
        )  # fmt: skip
    return out
