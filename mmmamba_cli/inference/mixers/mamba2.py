"""Mamba-2 over packed weights; the gates are dt.

A mixer without norm or RoPE on q and k decodes by one fused op between its projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmmamba_cli.inference.packed_gated import PackedGated, pack_gated
from mmmamba_cli.inference.packed_mixer import PackedProjection
from mmmamba_cli.model.mixers.mamba2 import Mamba2
from mmmamba_cli.ops import ssd, ssd_step
from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.ops.decode import MixerWeights, mixer_step


@dataclass(frozen=True)
class SSDScan:
    """See `PackedScan`; A is negative."""

    A: Tensor
    dt_bias: Tensor
    D: Tensor | None

    def step(
        self, v: Tensor, k: Tensor, q: Tensor, gates: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return ssd_step(
            v, gates, self.A, k, q, state, dt_bias=self.dt_bias, dt_softplus=True, D=self.D
        )

    def chunk(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        gates: Tensor,
        state: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return ssd(
            v,
            gates,
            self.A,
            k,
            q,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            D=self.D,
            initial_state=state,
            mask=mask,
        )


def pack(mixer: Mamba2, inputs: PackedProjection, output: PackedProjection) -> PackedGated:
    """See `pack_mixer`."""
    skip = None if mixer.D is None else mixer.D.detach()
    scan = SSDScan(upcast(-torch.exp(mixer.A_log.detach())), mixer.dt_bias.detach(), skip)
    packed = pack_gated(mixer, inputs, output, scan)
    weights = MixerWeights(packed.conv_weight, packed.conv_bias, scan.A, scan.dt_bias, scan.D)
    return packed.with_fused_step(partial(mixer_step, weights=weights))
