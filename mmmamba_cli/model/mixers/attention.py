"""Grouped-query softmax attention with RoPE, the mixer of the teacher.

Legend: B batch, T tokens, H query heads, P head dim, D hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import Cache

from mmmamba_cli.model.mixer import query_key_products, register_mixer
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.model.softmax_mixer import SoftmaxMixer
from mmmamba_cli.ops.backends import upcast


@register_mixer("attention")
class Attention(SoftmaxMixer):
    """Causal attention, (B, T, D) -> (B, T, D); `mix` omits the output projection."""

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        return self.o_proj(self.mix(hidden, layout, cache, weights))

    def mix(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Compute softmax(q k^T / sqrt(P)) v before W_O, (B, T, H * P); see `attend`."""
        q, k, v = (x.transpose(1, 2) for x in self.queries_keys_values(hidden, layout))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self.attend(q, k, v, layout, weights).transpose(1, 2).flatten(2)

    def empty_states(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Raise `TypeError`: attention keeps all keys and values, and no state of fixed size."""
        raise TypeError("attention has no state of fixed size")

    def reset_parameters(self) -> None:
        """Do nothing: attention has projections and norms only."""

    @staticmethod
    def initial_value(
        name: str, shape: tuple[int, ...], mimic: bool, rng: torch.Generator
    ) -> Tensor:
        """Raise `KeyError`: attention has no parameter that the teacher's lacks."""
        raise KeyError(name)

    def mixing_matrix(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        """softmax(q k^T / sqrt(P)), (B, H, T, T) fp32, 0 at masked keys."""
        q, k, _ = self.queries_keys_values(hidden, layout)
        scores = query_key_products(upcast(q), upcast(k)) / math.sqrt(self.head_dim)
        return torch.softmax(scores.masked_fill(~layout.visible_keys(), -math.inf), dim=-1)
