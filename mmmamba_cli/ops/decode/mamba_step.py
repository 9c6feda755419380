"""One token of a Mamba-2 mixer between its projections: convolution, SiLU and scan.

Source: the mixer of mmMamba, arXiv 2502.13145, section 3. Its gated norm is part of the following
projection, `ops.project`.
"""

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import get_backend, optional_backend
from mmmamba_cli.ops.decode import reference
from mmmamba_cli.ops.decode.step_inputs import check_step_inputs, select_step_backend


class MixerWeights(NamedTuple):
    """Weights of a mixer between its projections; channels are those of [v, k, q].

    `conv_weight` (Ch, W) and `conv_bias` (Ch,) as in `causal_conv`; A (negative), `dt_bias` and D
    (H,) as in `ssd` with softplus.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    dt_bias: Tensor | None
    D: Tensor | None


class MixerStepBackend(Protocol):
    """Signature of a backend: the validated arguments of `mixer_step`."""

    def __call__(
        self,
        vkq: Tensor,
        dt: Tensor,
        conv_ring: Tensor,
        ssm_state: Tensor,
        position: Tensor,
        weights: MixerWeights,
        *,
        inputs_ready: bool,
    ) -> Tensor: ...


MIXER_STEP_BACKENDS: dict[str, MixerStepBackend] = {
    "reference": reference.mixer_step,
    **optional_backend("triton", f"{__package__}.fused", "mixer_step"),
}


def mixer_step(
    vkq: Tensor,
    dt: Tensor,
    conv_ring: Tensor,
    ssm_state: Tensor,
    position: Tensor,
    weights: MixerWeights,
    *,
    inputs_ready: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One token of `causal_conv` with SiLU and `ssd` with softplus; updates both states in place.

    A mixer with a norm or RoPE on q and k, which come between the two, has to call the ops one by
    one.

    Args:
        vkq: packed projections of the token, (B, Ch), Ch = K P + K N + H N; only the last dimension
            has to be contiguous, as in a slice.
        dt: (B, H), before bias and softplus; only the last dimension has to be contiguous.
        conv_ring: inputs of the last W tokens, (B, Ch, W), token t in slot t mod W. This token's
            inputs are written into its slot; the others hold the previous W - 1 tokens
            (`to_ring_buffer`).
        ssm_state: (B, H, P, N), fp32; overwritten by the state after the token.
        position: (1,) integer on the device, the token's index t.
        weights: weights of the mixer between its projections.
        inputs_ready: whether states and position were written before the launch that made vkq and
            dt. The kernel then reads them while that launch still runs.
        backend: "reference", "triton" (no gradient), or "auto": triton on a GPU if it is installed,
            P and N are at most 256, B at most 1024 and no tensor requires a gradient.

    Returns:
        The scan's output (B, H, P) in vkq's dtype, before norm and gate; the same numbers as the
        two ops, including the roundings between them.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    op, gates, state = "mixer_step", ("dt", dt, 1), ("ssm_state", ssm_state)
    check_step_inputs(op, vkq, gates, conv_ring, state, position, weights)
    if backend == "auto":
        backend = select_step_backend(MIXER_STEP_BACKENDS, vkq, dt, conv_ring, ssm_state)
    step = get_backend(op, backend, MIXER_STEP_BACKENDS)
    return step(vkq, dt, conv_ring, ssm_state, position, weights, inputs_ready=inputs_ready)


def to_ring_buffer(conv_state: Tensor, position: int) -> Tensor:
    """Convert a convolution state to the ring buffer (B, Ch, W) that token `position` reads.

    `conv_state` (B, Ch, W - 1), as `causal_conv` returns it, holds previous tokens, oldest first.
    """
    # Before the roll, slot i holds token position - W + i; slot 0 is free for the next token.
    ring = F.pad(conv_state, (1, 0))
    return ring.roll(position % ring.shape[-1], dims=-1)
