"""One token of a Gated DeltaNet mixer between its projections: convolution, SiLU and delta rule.

Sources: Yang et al., arXiv 2412.06464, equation 10; the convolution over [v, k, q] of mmMamba,
arXiv 2502.13145. Its gated norm is part of the following projection, `ops.project`.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import get_backend, optional_backend, upcast
from mmmamba_cli.ops.decode.reference import convolve_token
from mmmamba_cli.ops.decode.step_inputs import check_step_inputs, select_step_backend
from mmmamba_cli.ops.delta import delta_rule_step


class DeltaWeights(NamedTuple):
    """Weights of a mixer between its projections; channels are those of [v, k, q].

    `conv_weight` (Ch, W) and `conv_bias` (Ch,) as in `causal_conv`; A (negative), `dt_bias` and
    `beta_bias` (H,) in fp32: the decay is exp(A softplus(dt + dt_bias)), the write strength
    sigmoid(beta + beta_bias).
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    dt_bias: Tensor
    beta_bias: Tensor


class DeltaStepBackend(Protocol):
    """Signature of a backend: the validated arguments of `delta_mixer_step`."""

    def __call__(
        self,
        vkq: Tensor,
        gates: Tensor,
        conv_ring: Tensor,
        state: Tensor,
        position: Tensor,
        weights: DeltaWeights,
        *,
        inputs_ready: bool,
    ) -> Tensor: ...


def reference(
    vkq: Tensor,
    gates: Tensor,
    conv_ring: Tensor,
    state: Tensor,
    position: Tensor,
    weights: DeltaWeights,
    *,
    inputs_ready: bool,
) -> Tensor:
    """Shapes as in `delta_mixer_step`; `inputs_ready` has no effect."""
    v, k, q = convolve_token(vkq, conv_ring, position, weights, state.shape)
    dt, beta = upcast(gates).chunk(2, dim=-1)
    y, after = delta_rule_step(
        v,
        k,
        q,
        weights.A * F.softplus(dt + weights.dt_bias),
        torch.sigmoid(beta + weights.beta_bias),
        # Autograd needs the state from before the in-place update.
        state.clone(),
        qk_l2_norm=True,
    )
    state.copy_(after)
    conv_ring.index_copy_(-1, position % conv_ring.shape[-1], vkq.unsqueeze(-1).to(conv_ring.dtype))
    return y


DELTA_MIXER_STEP_BACKENDS: dict[str, DeltaStepBackend] = {
    "reference": reference,
    **optional_backend("triton", f"{__package__}.delta_fused", "delta_mixer_step"),
}


def delta_mixer_step(
    vkq: Tensor,
    gates: Tensor,
    conv_ring: Tensor,
    state: Tensor,
    position: Tensor,
    weights: DeltaWeights,
    *,
    inputs_ready: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One token of `causal_conv` with SiLU and `delta_rule`; updates both states in place.

    q and k are divided by their 2-norm, as `delta_rule` does with `qk_l2_norm`. A mixer with RoPE
    or a norm on q and k, which come between the two, has to call the ops one by one.

    Args:
        vkq: packed projections of the token, (B, Ch), Ch = K P + K N + H N; only the last dimension
            has to be contiguous, as in a slice.
        gates: [dt|beta] (B, 2 H), before biases, softplus and sigmoid; only the last dimension has
            to be contiguous.
        conv_ring: inputs of the last W tokens, (B, Ch, W), as in `mixer_step`.
        state: (B, H, P, N), fp32; overwritten by the state after the token.
        position: (1,) integer on the device, the token's index t.
        weights: weights of the mixer between its projections.
        inputs_ready: whether states and position were written before the launch that made vkq and
            gates. The kernel then reads them while that launch still runs.
        backend: "reference", "triton" (no gradient), or "auto": triton on a GPU if it is installed,
            P and N are at most 256, B at most 1024 and no tensor requires a gradient.

    Returns:
        The read-out (B, H, P) in vkq's dtype, before norm and gate.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    op, named_gates, named_state = "delta_mixer_step", ("gates", gates, 2), ("state", state)
    check_step_inputs(op, vkq, named_gates, conv_ring, named_state, position, weights)
    if backend == "auto":
        backend = select_step_backend(DELTA_MIXER_STEP_BACKENDS, vkq, gates, conv_ring, state)
    step = get_backend(op, backend, DELTA_MIXER_STEP_BACKENDS)
    return step(vkq, gates, conv_ring, state, position, weights, inputs_ready=inputs_ready)
