"""Mamba-2 over packed weights; the gates are dt.

A mixer without norm or RoPE on q and k decodes by one fused op between its projections.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmmamba_cli.inference.packed_gated import PackedGated, pack_gated
from mmmamba_cli.inference.packed_mixer import PackedProjection, TokenInfo
from mmmamba_cli.inference.recurrent_cache import RecurrentCache
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


@dataclass(frozen=True)
class PackedMamba2(PackedGated):
    """A mixer with a fused step: no norm or RoPE between convolution and scan."""

    weights: MixerWeights | None = None

    def empty_cache(self, like: Tensor, batch: int, capacity: int) -> RecurrentCache:
        cache = super().empty_cache(like, batch, capacity)
        return replace(cache, ring=like.new_zeros(batch, *self.conv_weight.shape))

    def between(
        self, cache: RecurrentCache, vkq: Tensor, gates: Tensor, token: TokenInfo
    ) -> Tensor:
        assert self.weights is not None and cache.ring is not None
        return mixer_step(
            vkq,
            gates,
            cache.ring,
            cache.ssm,
            token.column,
            self.weights,
            # States and position were written by the previous token's launches.
            inputs_ready=True,
            backend=token.backend,
        )


def pack(mixer: Mamba2, inputs: PackedProjection, output: PackedProjection) -> PackedGated:
    """See `pack_mixer`."""
    skip = None if mixer.D is None else mixer.D.detach()
    scan = SSDScan(upcast(-torch.exp(mixer.A_log.detach())), mixer.dt_bias.detach(), skip)
    packed = pack_gated(mixer, inputs, output, scan)
    if packed.qk_norm is not None or packed.rope:
        return packed
    weights = MixerWeights(packed.conv_weight, packed.conv_bias, scan.A, scan.dt_bias, scan.D)
    return PackedMamba2(**vars(packed), weights=weights)
