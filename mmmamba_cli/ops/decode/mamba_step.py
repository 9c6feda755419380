"""One token of a Mamba-2 mixer: convolution, SiLU and the scan, between the projections.

Source: the mixer of mmMamba, arXiv 2502.13145, section 3. Its gated norm is done by the projection
that follows, `ops.project`.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, kernel_backends, pick_backend, suits_triton
from mmmamba_cli.ops.decode import reference


class MixerWeights(NamedTuple):
    """What a mixer has between its projections; channels are those of [v, k, q].

    `conv_weight` (Ch, W) and `conv_bias` (Ch,) as in `causal_conv`; A (negative), `dt_bias` and D
    (H,) as in `ssd` with softplus.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    dt_bias: Tensor | None
    D: Tensor | None


class MixerStepBackend(Protocol):
    """What `mixer_step` hands to a backend: its own arguments, checked."""

    def __call__(
        self,
        vkq: Tensor,
        dt: Tensor,
        conv_ring: Tensor,
        ssm_state: Tensor,
        position: Tensor,
        weights: MixerWeights,
        *,
        settled: bool,
    ) -> Tensor: ...


MIXER_STEP_BACKENDS: dict[str, MixerStepBackend] = {
    "reference": reference.mixer_step,
    **kernel_backends("decode", "mixer_step"),
}
# A program holds whole rows of a head's state.
MOST_TRITON_DIMS = 256
# Timed on an H200 up to so many; more were not tried.
MOST_TRITON_ROWS = 1024


def mixer_step(
    vkq: Tensor,
    dt: Tensor,
    conv_ring: Tensor,
    ssm_state: Tensor,
    position: Tensor,
    weights: MixerWeights,
    *,
    settled: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One token of `causal_conv` with SiLU and of `ssd` with softplus; both states in place.

    There is no room for a norm or a rotation of q and k: mixers with these call the ops one by
    one.

    Args:
        vkq: projections of the token side by side, (B, Ch), Ch = K P + K N + H N; rows may lie
            apart, as those of a slice do.
        dt: (B, H), before bias and softplus; rows may lie apart.
        conv_ring: inputs of the last W tokens, (B, Ch, W), token t in slot t mod W: this token's
            are written into its slot, the other slots hold the W - 1 tokens before (`ring_of`).
        ssm_state: (B, H, P, N), fp32; becomes the state after the token.
        position: (1,) integer, the token's number t, read on the device.
        weights: what the mixer has between its projections.
        settled: whether states and position were written before the launch that made vkq and dt:
            the kernel then reads them while that one still runs.
        backend: "reference", "triton", which has no gradient, or "auto": triton on a GPU if it is
            installed, no dim is larger than 256, there are at most 1024 rows and no gradient of the
            tensors is wanted.

    Returns:
        The read-out (B, H, P) in vkq's dtype, before norm and gate; the same numbers as the two
        ops give, roundings between them included.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    _check(vkq, dt, conv_ring, ssm_state, position, weights)
    if backend == "auto":
        tensors = (vkq, dt, conv_ring, ssm_state)
        small = max(ssm_state.shape[2:]) <= MOST_TRITON_DIMS and len(vkq) <= MOST_TRITON_ROWS
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        fused = "triton" in MIXER_STEP_BACKENDS and small and not learns and suits_triton(*tensors)
        backend = "triton" if fused else "reference"
    step = pick_backend("mixer_step", backend, MIXER_STEP_BACKENDS)
    return step(vkq, dt, conv_ring, ssm_state, position, weights, settled=settled)


def ring_of(conv_state: Tensor, position: int) -> Tensor:
    """The ring (B, Ch, W) from which token `position` goes on.

    `conv_state` (B, Ch, W - 1) is what `causal_conv` returns: the tokens before, oldest first.
    """
    # Slot i of the unrolled ring is token position - W + i; slot 0 waits for the token to come.
    ring = F.pad(conv_state, (1, 0))
    return ring.roll(position % ring.shape[-1], dims=-1)


def conv_state_of(conv_ring: Tensor, position: int) -> Tensor:
    """What `ring_of` was made from: the W - 1 tokens before `position`, (B, Ch, W - 1)."""
    return conv_ring.roll(-(position % conv_ring.shape[-1]), dims=-1)[..., 1:]


def _check(
    vkq: Tensor,
    dt: Tensor,
    conv_ring: Tensor,
    ssm_state: Tensor,
    position: Tensor,
    weights: MixerWeights,
) -> None:
    if vkq.dim() != 2 or ssm_state.dim() != 4 or weights.conv_weight.dim() != 2:
        raise ValueError(
            f"mixer_step: vkq is {tuple(vkq.shape)}, ssm_state {tuple(ssm_state.shape)} and "
            f"conv_weight {tuple(weights.conv_weight.shape)}, expected (B, Ch), (B, H, P, N) and "
            "(Ch, W)"
        )
    (batch, channels), (_, heads, value_dim, state_dim) = vkq.shape, ssm_state.shape
    kv_heads, rest = divmod(channels - heads * state_dim, value_dim + state_dim)
    if rest or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"mixer_step: {channels} channels of vkq are not those of {heads} query heads of "
            f"{state_dim} and of key/value heads of {state_dim} and {value_dim}"
        )
    taps = weights.conv_weight.shape[1]
    check_shape("mixer_step", "dt", dt, (batch, heads))
    check_shape("mixer_step", "conv_weight", weights.conv_weight, (channels, taps))
    check_shape("mixer_step", "conv_bias", weights.conv_bias, (channels,))
    check_shape("mixer_step", "conv_ring", conv_ring, (batch, channels, taps))
    check_shape("mixer_step", "ssm_state", ssm_state, (batch, heads, value_dim, state_dim))
    check_shape("mixer_step", "position", position, (1,))
    for name in ("A", "dt_bias", "D"):
        check_shape("mixer_step", name, getattr(weights, name), (heads,))
