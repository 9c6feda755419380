"""Checks of arguments and the choice of a backend that the steps of recurrent mixers share.

Legend as in `ops.decode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, needs_grad, supports_triton

if TYPE_CHECKING:
    from mmmamba_cli.ops.decode.delta_step import DeltaWeights
    from mmmamba_cli.ops.decode.mamba_step import MixerWeights

# Each program holds whole rows of a head's state in registers.
MAX_TRITON_DIM = 256
# The largest batch that was benchmarked (H200).
MAX_TRITON_BATCH = 1024


def select_step_backend(
    backends: Mapping[str, object], vkq: Tensor, gates: Tensor, conv_ring: Tensor, state: Tensor
) -> str:
    """The backend of `auto`: triton on a GPU if it fits the sizes and no gradient is needed."""
    tensors = (vkq, gates, conv_ring, state)
    fits = max(state.shape[2:]) <= MAX_TRITON_DIM and len(vkq) <= MAX_TRITON_BATCH
    has_triton = "triton" in backends
    fused = has_triton and fits and not needs_grad(*tensors) and supports_triton(*tensors)
    return "triton" if fused else "reference"


def check_step_inputs(
    op: str,
    vkq: Tensor,
    gates: tuple[str, Tensor, int],
    conv_ring: Tensor,
    state: tuple[str, Tensor],
    position: Tensor,
    weights: MixerWeights | DeltaWeights,
) -> None:
    """Raise ValueError for shapes that do not fit together.

    `gates` and `state` come with their names in the signature of `op`; `gates` (B, n H) also with
    n. All weights but those of the convolution are (H,).
    """
    (gates_name, gates_tensor, per_head), (state_name, state_tensor) = gates, state
    conv_weight = weights.conv_weight
    if vkq.dim() != 2 or state_tensor.dim() != 4 or conv_weight.dim() != 2:
        raise ValueError(
            f"{op}: vkq is {tuple(vkq.shape)}, {state_name} {tuple(state_tensor.shape)} and "
            f"conv_weight {tuple(conv_weight.shape)}, expected (B, Ch), (B, H, P, N) and (Ch, W)"
        )
    (batch, channels), (_, heads, value_dim, state_dim) = vkq.shape, state_tensor.shape
    kv_heads, rest = divmod(channels - heads * state_dim, value_dim + state_dim)
    if rest or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: {channels} channels of vkq are not those of {heads} query heads of "
            f"{state_dim} and of key/value heads of {state_dim} and {value_dim}"
        )
    taps = conv_weight.shape[1]
    check_shape(op, gates_name, gates_tensor, (batch, per_head * heads))
    check_shape(op, "conv_weight", conv_weight, (channels, taps))
    check_shape(op, "conv_bias", weights.conv_bias, (channels,))
    check_shape(op, "conv_ring", conv_ring, (batch, channels, taps))
    check_shape(op, state_name, state_tensor, (batch, heads, value_dim, state_dim))
    check_shape(op, "position", position, (1,))
    for name, vector in weights._asdict().items():
        if name not in ("conv_weight", "conv_bias"):
            check_shape(op, name, vector, (heads,))
