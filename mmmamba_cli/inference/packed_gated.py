"""Recurrent mixers over packed weights: convolution, a scan, and the gated norm in front of W_O.

Legend: B batch, T columns of a chunk, D hidden size, H query heads, K key/value heads, P head dim,
Ch channels of [v, k, q], W convolution width, R rows of the packed gates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mmmamba_cli.inference.packed_mixer import (
    ChunkPadding,
    PackedProjection,
    QKNorm,
    TokenInfo,
    normalize_qk,
    packed_qk_norm,
)
from mmmamba_cli.inference.recurrent_cache import RecurrentCache, last_columns
from mmmamba_cli.model.gated_mixer import GatedMixer
from mmmamba_cli.model.rope import apply_rope
from mmmamba_cli.ops import causal_conv, causal_conv_step
from mmmamba_cli.ops.backends import compute_dtype
from mmmamba_cli.ops.projection import project


class PackedScan(Protocol):
    """The scan of a mixer. `gates` are the outputs of the packed projections behind the gate.

    Gates of -inf leave the state as it is: they mark padding.
    """

    def step(
        self, v: Tensor, k: Tensor, q: Tensor, gates: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token: v, k (B, K, P), q (B, H, P), gates (B, R); y (B, H, P) and the new state."""
        ...

    def chunk(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        gates: Tensor,
        state: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """T columns: v, k (B, T, K, P), q (B, T, H, P), gates (B, T, R); y (B, T, H, P)."""
        ...


class FusedStep(Protocol):
    """One token of convolution and scan as one op, with its weights; see `ops.mixer_step`."""

    def __call__(
        self,
        vkq: Tensor,
        gates: Tensor,
        conv_ring: Tensor,
        state: Tensor,
        position: Tensor,
        *,
        inputs_ready: bool,
        backend: str,
    ) -> Tensor: ...


@dataclass(frozen=True)
class PackedGated:
    """A recurrent mixer; `inputs` is [v|k|q|g|gates]. See `PackedMixer`.

    The state is (B, H, P, P). `fused_step`, if there is one, reads a token in place of `scan`.
    """

    inputs: PackedProjection
    output: PackedProjection
    conv_weight: Tensor
    conv_bias: Tensor | None
    qk_norm: QKNorm | None
    scan: PackedScan
    rope: bool
    heads: int
    kv_heads: int
    head_dim: int
    tile_taps: bool
    fused_step: FusedStep | None = None
    grows: bool = False

    def with_fused_step(self, step: FusedStep) -> PackedGated:
        """Decode by `step`, unless a norm or RoPE on q and k comes between convolution and scan."""
        if self.qk_norm is not None or self.rope:
            return self
        return replace(self, fused_step=step)

    @property
    def chunks(self) -> bool:
        # Taps inside tiles need the tiles of the prompt, which the modules know.
        return not self.rope and not self.tile_taps

    @property
    def right_padding(self) -> bool:
        return self.chunks

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of v, k and q."""
        kv_width = self.kv_heads * self.head_dim
        return kv_width, kv_width, self.heads * self.head_dim

    def empty_cache(self, like: Tensor, batch: int, capacity: int) -> RecurrentCache:
        channels, width = self.conv_weight.shape
        fused = self.fused_step is not None
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        return RecurrentCache(
            conv=like.new_zeros(batch, channels, width - 1),
            ring=like.new_zeros(batch, channels, width) if fused else None,
            ssm=torch.zeros(shape, dtype=compute_dtype(like), device=like.device),
        )

    def step(
        self, cache: RecurrentCache, inputs: Tensor, hidden: Tensor, token: TokenInfo
    ) -> Tensor:
        vkq, gate, gates = self._split(inputs)
        if self.fused_step is None:
            y = self._convolve_and_scan(cache, vkq, gates, token)
        else:
            assert cache.ring is not None
            y = self.fused_step(
                vkq,
                gates,
                cache.ring,
                cache.ssm,
                token.column,
                # States and position were written by the previous token's launches.
                inputs_ready=True,
                backend=token.backend,
            )
        return project(
            y.flatten(1),
            self.output.weight,
            **self.output.options,
            gate=gate,
            residual=hidden,
            out=hidden,
            # The gate was written by the input projection, before the scan's launch.
            inputs_ready=True,
            backend=token.backend,
        )

    def _convolve_and_scan(
        self, cache: RecurrentCache, vkq: Tensor, gates: Tensor, token: TokenInfo
    ) -> Tensor:
        """The scan's output (B, H, P) from vkq (B, Ch) and gates (B, R); updates the cache."""
        mixed, conv = causal_conv_step(vkq, self.conv_weight, self.conv_bias, cache.conv)
        cache.conv.copy_(conv)
        v, k, q = self._heads(mixed)
        q, k = normalize_qk(self.qk_norm, q, k)
        if self.rope:
            assert token.cos is not None and token.sin is not None
            cos, sin = token.cos.unsqueeze(1), token.sin.unsqueeze(1)
            q, k = (apply_rope(x.unsqueeze(1), cos, sin).squeeze(1) for x in (q, k))
        y, state = self.scan.step(v, k, q, gates, cache.ssm)
        cache.ssm.copy_(state)
        return y

    def chunk(
        self,
        cache: RecurrentCache,
        rows: Tensor,
        batch: int,
        mask: Tensor | None,
        padding: ChunkPadding | None,
    ) -> Tensor:
        inputs = project(rows, self.inputs.weight, **self.inputs.options)
        vkq, gate, gates = self._split(inputs)
        if padding is not None:
            # Zero inputs leave the convolution unchanged; gates of -inf leave the state.
            inputs.unflatten(0, (batch, -1)).masked_fill_(padding.columns, 0)
            gates.unflatten(0, (batch, -1)).masked_fill_(padding.columns, -math.inf)
        vkq = vkq.unflatten(0, (batch, -1))
        mixed, conv = causal_conv(
            vkq, self.conv_weight, self.conv_bias, initial_state=cache.conv, mask=mask
        )
        v, k, q = self._heads(mixed)
        q, k = normalize_qk(self.qk_norm, q, k)
        y, state = self.scan.chunk(v, k, q, gates.unflatten(0, (batch, -1)), cache.ssm, mask)
        if padding is not None and padding.length is not None:
            conv = last_columns(vkq, padding.length, conv.shape[-1])
        cache.conv.copy_(conv)
        cache.ssm.copy_(state)
        return project(
            y.reshape(len(rows), -1),
            self.output.weight,
            **self.output.options,
            gate=gate,
            residual=rows,
            out=rows,
        )

    def _split(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[v|k|q], the output gate, and the gates of the scan."""
        channels, width = sum(self.widths), self.heads * self.head_dim
        vkq, gate, gates = inputs.split(
            (channels, width, inputs.shape[-1] - channels - width), dim=-1
        )
        return vkq, gate, gates

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v, k and q by heads, (..., heads, P)."""
        v, k, q = (x.unflatten(-1, (-1, self.head_dim)) for x in mixed.split(self.widths, dim=-1))
        return v, k, q


def pack_gated(
    mixer: GatedMixer, inputs: PackedProjection, output: PackedProjection, scan: PackedScan
) -> PackedGated:
    """A recurrent mixer over packed weights, without a fused step."""
    bias = mixer.conv1d.bias
    return PackedGated(
        inputs,
        output,
        conv_weight=mixer.conv1d.weight.detach().squeeze(1),
        conv_bias=None if bias is None else bias.detach(),
        qk_norm=packed_qk_norm(mixer.q_norm, mixer.k_norm),
        scan=scan,
        rope=mixer.rope,
        heads=mixer.num_heads,
        kv_heads=mixer.num_kv_heads,
        head_dim=mixer.head_dim,
        tile_taps=mixer.tile_taps is not None,
    )
