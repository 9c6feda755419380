"""Grouped-query softmax attention with RoPE, the mixer of the teacher.

Legend: B batch, T tokens, H query heads, K key/value heads, P head dim, D hidden size.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache

from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.mixer import query_key_products, register_mixer
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.model.rope import apply_rope
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops import attention
from mmmamba_cli.ops.attention import attention_weights, supports_varlen
from mmmamba_cli.ops.backends import upcast


@register_mixer("attention")
class Attention(nn.Module):
    """Causal attention, (B, T, D) -> (B, T, D); `mix` omits the output projection."""

    input_projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    output_norm: ClassVar[None] = None

    def __init__(self, config: HolisticVLMConfig, layer_idx: int):
        super().__init__()
        stack, hidden_size = config.stack_of(layer_idx), config.hidden_size
        # Shared with the model, since its attn_implementation may change later.
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = stack.num_heads
        self.num_kv_heads = stack.num_kv_heads
        self.head_dim = stack.head_dim
        width, kv_width = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=stack.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=stack.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=stack.qkv_bias)
        self.o_proj = nn.Linear(width, hidden_size, bias=stack.output_bias)
        self.q_norm = RMSNorm(stack.head_dim, stack.rms_norm_eps) if stack.qk_norm else None
        self.k_norm = RMSNorm(stack.head_dim, stack.rms_norm_eps) if stack.qk_norm else None

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
        """Compute softmax(q k^T / sqrt(P)) v before W_O, (B, T, H * P).

        Uses PyTorch's attention or a kernel; the reference if attn_implementation is "eager". The
        softmax (B, H, T, keys) is appended to `weights` if given.
        """
        q, k, v = (x.transpose(1, 2) for x in self.queries_keys_values(hidden, layout))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        is_causal = layout.length > 1 and layout.is_plain_causal(k.shape[2])
        eager = self.config._attn_implementation == "eager"
        varlen = None
        if not is_causal and not eager and supports_varlen(q):
            varlen = layout.varlen(k.shape[2])
        mask = None
        if not is_causal and varlen is None:
            mask = layout.attention_mask(k.shape[2])
        if weights is None:
            backend = "reference" if eager else "auto"
            y = attention(q, k, v, is_causal=is_causal, mask=mask, varlen=varlen, backend=backend)
        else:
            weights.append(attention_weights(q, k, is_causal=is_causal, mask=mask).to(v.dtype))
            y = weights[-1] @ v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        return y.transpose(1, 2).flatten(2)

    def queries_keys_values(
        self, hidden: Tensor, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, P), k and v (B, T, K, P), after the optional norm and RoPE of q and k."""
        batch, length, _ = hidden.shape
        q = self.q_proj(hidden).view(batch, length, self.num_heads, self.head_dim)
        k = self.k_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim)
        v = self.v_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, layout.cos, layout.sin), apply_rope(k, layout.cos, layout.sin), v

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
