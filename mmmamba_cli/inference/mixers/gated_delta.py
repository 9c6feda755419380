"""Gated DeltaNet over packed weights; the gates are [dt|beta]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.inference.packed_gated import PackedGated, pack_gated
from mmmamba_cli.inference.packed_mixer import PackedProjection
from mmmamba_cli.model.mixers.gated_delta import GatedDelta
from mmmamba_cli.ops import delta_rule, delta_rule_step
from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.ops.decode import DeltaWeights, delta_mixer_step


@dataclass(frozen=True)
class DeltaScan:
    """See `PackedScan`; A is negative, and all tensors are (H,) in fp32."""

    A: Tensor
    dt_bias: Tensor
    beta_bias: Tensor

    def step(
        self, v: Tensor, k: Tensor, q: Tensor, gates: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_decay, beta = self._decay_and_beta(gates)
        return delta_rule_step(v, k, q, log_decay, beta, state, qk_l2_norm=True)

    def chunk(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        gates: Tensor,
        state: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        log_decay, beta = self._decay_and_beta(gates)
        return delta_rule(v, k, q, log_decay, beta, qk_l2_norm=True, initial_state=state, mask=mask)

    def _decay_and_beta(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        dt, beta = upcast(gates).chunk(2, dim=-1)
        return self.A * F.softplus(dt + self.dt_bias), torch.sigmoid(beta + self.beta_bias)


def pack(mixer: GatedDelta, inputs: PackedProjection, output: PackedProjection) -> PackedGated:
    """See `pack_mixer`."""
    scan = DeltaScan(
        A=upcast(-torch.exp(mixer.A_log.detach())),
        dt_bias=mixer.dt_bias.detach(),
        beta_bias=mixer.beta_bias.detach(),
    )
    packed = pack_gated(mixer, inputs, output, scan)
    weights = DeltaWeights(packed.conv_weight, packed.conv_bias, **vars(scan))
    return packed.with_fused_step(partial(delta_mixer_step, weights=weights))
