"""Short causal depthwise convolution with a state, which precedes the SSD scan.

Sources: Mamba-2 (Dao & Gu), arXiv 2405.21060, section 7; over the channels of [v, k, q] with SiLU:
mmMamba, arXiv 2502.13145.
"""

from typing import Literal, Protocol

from torch import Tensor

from mmmamba_cli.ops.backends import (
    check_shape,
    fits_grid,
    get_backend,
    optional_backend,
    supports_triton,
)
from mmmamba_cli.ops.conv import reference

Activation = Literal["silu"] | None


class ConvBackend(Protocol):
    """A backend of `causal_conv`, called with its arguments after validation, with T >= 1."""

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
    """A backend of `causal_conv_step`, called with its arguments after validation."""

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
    **optional_backend("triton", f"{__package__}.fused", "convolve"),
}
CONV_STEP_BACKENDS: dict[str, ConvStepBackend] = {"reference": reference.step}


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
    """Convolve each channel with its own W taps, over the token and the W - 1 before it.

        y_t = act(bias + sum_{w < W} weight[:, w] * x_{t - (W - 1) + w})

    Legend: B batch, T tokens, Ch channels, W taps (at least 1).

    Args:
        x: (B, T, Ch), any floating dtype.
        weight: (Ch, W); the last tap multiplies the token itself.
        bias: (Ch,).
        activation: "silu", or None for none.
        initial_state: (B, Ch, W - 1), the inputs before this call, oldest first; zeros if None.
        mask: (B, T) bool or int, 0 at padding, which may be anywhere in a row. Padding is skipped:
            the taps connect the real tokens on both sides of it. Its y is exactly 0, and its
            inputs are ignored, NaN included.
        seq_idx: (B, T) integer ids of packed sequences. A sequence starts at each real token whose
            id differs from that of the previous real token, and no tap crosses the start;
            `initial_state` belongs to the first sequence of the row.
        backend: "reference", "triton", or "auto": triton on a GPU if it is installed, no tensor is
            fp64 and B is at most 65,535.

    Returns:
        y (B, T, Ch) in x's dtype, computed in fp32, or fp64 if x is fp64; and the state
        (B, Ch, W - 1) in x's dtype, the last W - 1 inputs of the last sequence, preceded by zeros
        if it has fewer.

    Raises:
        ValueError: inconsistent shapes, or an unknown activation.
        MmmambaError: a backend that is not available.
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
        has_triton = "triton" in CONV_BACKENDS and fits_grid(batch)
        fused = has_triton and supports_triton(x, weight, bias, initial_state)
        backend = "triton" if fused else "reference"
    conv = get_backend("causal_conv", backend, CONV_BACKENDS)
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
    """Run one token of `causal_conv`, for decoding.

    Args:
        x: (B, Ch).
        weight, bias, activation: as in `causal_conv`.
        state: the inputs before this token, oldest first, (B, Ch, W - 1); not modified.
        backend: "reference" or "auto".

    Returns:
        y (B, Ch) and the new state (B, Ch, W - 1), both in x's dtype.

    Raises:
        ValueError: inconsistent shapes, or an unknown activation.
        MmmambaError: a backend that is not available.
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
    step = get_backend("causal_conv_step", name, CONV_STEP_BACKENDS)
    return step(x, weight, bias, state, activation=activation)


def _check_activation(op: str, activation: str | None) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}, expected 'silu' or None")
