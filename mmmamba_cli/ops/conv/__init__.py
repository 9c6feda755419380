"""Short causal depthwise convolution with a state, as in front of the SSD scan.

Source: Mamba-2 (Dao & Gu), arXiv 2405.21060, section 7; over the channels of [v, k, q] with SiLU:
mmMamba, arXiv 2502.13145.
"""

from typing import Literal, Protocol

from torch import Tensor

from mmmamba_cli.ops.backends import (
    check_shape,
    fits_grid,
    kernel_backends,
    pick_backend,
    suits_triton,
)
from mmmamba_cli.ops.conv import reference

Activation = Literal["silu"] | None


class ConvBackend(Protocol):
    """What `causal_conv` hands to a backend: its own arguments, checked, with T >= 1."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: Activation,
        initial_state: Tensor | None,
        mask: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...


class ConvStepBackend(Protocol):
    """What `causal_conv_step` hands to a backend: its own arguments, checked."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor,
        *,
        activation: Activation,
    ) -> tuple[Tensor, Tensor]: ...


CONV_BACKENDS: dict[str, ConvBackend] = {
    "reference": reference.convolve,
    **kernel_backends("conv", "convolve"),
}
STEP_BACKENDS: dict[str, ConvStepBackend] = {"reference": reference.step}


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "silu",
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own W taps, each token with the W - 1 before it.

        y_t = act(bias + sum_{w < W} weight[:, w] * x_{t - (W - 1) + w})

    Legend: B batch, T tokens, Ch channels, W taps (at least 1).

    Args:
        x: (B, T, Ch), any floating dtype.
        weight: (Ch, W), the last tap for the token itself.
        bias: (Ch,).
        activation: "silu", or None for none.
        initial_state: (B, Ch, W - 1), the inputs before this call, oldest first; zeros if None.
        mask: (B, T) bool or int, 0 for padding, anywhere in a row: padding counts as not there, so
            the real tokens around it are neighbours, and y is exactly 0 there. Whatever padding
            holds, NaN included, changes nothing.
        seq_idx: (B, T) integer ids of packed sequences. One begins at each real token whose id
            differs from that of the real token before it, and no tap reaches across;
            `initial_state` belongs to the first sequence of the row.
        backend: "reference", "triton", or "auto": triton on a GPU if it is installed, nothing is
            fp64 and there are at most 65,535 rows.

    Returns:
        y (B, T, Ch) in x's dtype, computed in fp32, or fp64 where x is fp64; and the state, the
        last W - 1 inputs as they came (B, Ch, W - 1), in x's dtype, zeros where the last sequence
        has fewer.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
        MmmambaError: a backend that does not exist here.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(
            f"causal_conv: x is {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (B, T, Ch) and (Ch, W)"
        )
    batch, length, channels = x.shape
    past = weight.shape[1] - 1
    check_shape("causal_conv", "weight", weight, (channels, past + 1))
    check_shape("causal_conv", "bias", bias, (channels,))
    check_shape("causal_conv", "initial_state", initial_state, (batch, channels, past))
    check_shape("causal_conv", "mask", mask, (batch, length))
    check_shape("causal_conv", "seq_idx", seq_idx, (batch, length))
    _check_activation("causal_conv", activation)
    if backend == "auto":
        known = "triton" in CONV_BACKENDS and fits_grid(batch)
        fused = known and suits_triton(x, weight, bias, initial_state)
        backend = "triton" if fused else "reference"
    conv = pick_backend("causal_conv", backend, CONV_BACKENDS)
    if length == 0:
        state = x.new_zeros(batch, channels, past) if initial_state is None else initial_state
        return x, state.to(x.dtype)
    return conv(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_state,
        mask=mask,
        seq_idx=seq_idx,
    )


def causal_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    activation: Activation = "silu",
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv`, for decoding.

    Args:
        x: (B, Ch).
        weight, bias, activation: as in `causal_conv`.
        state: the inputs before this token, oldest first, (B, Ch, W - 1); not changed in place.
        backend: "reference" or "auto".

    Returns:
        y (B, Ch) and the new state (B, Ch, W - 1), both in x's dtype.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
        MmmambaError: a backend that does not exist here.
    """
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(
            f"causal_conv_step: x is {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (B, Ch) and (Ch, W)"
        )
    batch, channels = x.shape
    past = weight.shape[1] - 1
    check_shape("causal_conv_step", "weight", weight, (channels, past + 1))
    check_shape("causal_conv_step", "bias", bias, (channels,))
    check_shape("causal_conv_step", "state", state, (batch, channels, past))
    _check_activation("causal_conv_step", activation)
    name = "reference" if backend == "auto" else backend
    step = pick_backend("causal_conv_step", name, STEP_BACKENDS)
    return step(x, weight, bias, state, activation=activation)


def _check_activation(op: str, activation: str | None) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}, expected 'silu' or None")
