"""Base of the mixers with a softmax over keys: projections, RoPE, and causal attention.

Legend: B batch, T tokens, S keys, H query heads, K key/value heads, P head dim, D hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from mmmamba_cli.architecture import MixerShape
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.model.rope import apply_rope
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops import attention
from mmmamba_cli.ops.attention import attention_weights, supports_varlen


class SoftmaxMixer(nn.Module):
    """A mixer with the parameters of attention; a subclass implements the rest of `Mixer`."""

    input_projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    output_norm: ClassVar[None] = None

    def __init__(self, config: MixerShape, layer_idx: int):
        super().__init__()
        stack, hidden_size = config.stack_of(layer_idx), config.hidden_size
        # Shared with the model, since its attn_implementation may change later.
        self.config: Any = config
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

    @property
    def backend(self) -> str:
        """Backend of the ops over whole sequences: the reference if attention is "eager"."""
        return "reference" if self.config._attn_implementation == "eager" else "auto"

    def queries_keys_values(
        self, hidden: Tensor, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, P), k and v (B, T, K, P), after the optional norm and RoPE of q and k."""
        batch, length, _ = hidden.shape
        q = self.q_proj(hidden).view(batch, length, self.num_heads, self.head_dim)
        k = self.k_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim)
        v = self.v_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            # A norm of transformers returns fp32 where its weight is an fp32 master.
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        return apply_rope(q, layout.cos, layout.sin), apply_rope(k, layout.cos, layout.sin), v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: SequenceLayout,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """softmax(q k^T / sqrt(P)) v, (B, H, T, P).

        q is (B, H, T, P). k and v (B, K, S, P) have all columns so far, and may have unused ones
        behind them. Uses PyTorch's attention or a kernel; the reference if attn_implementation is
        "eager". The softmax (B, H, T, S) is appended to `weights` if given.
        """
        is_causal = layout.length > 1 and layout.is_plain_causal(k.shape[2])
        varlen = None
        if not is_causal and self.backend == "auto" and supports_varlen(q):
            varlen = layout.varlen(k.shape[2])
        mask = None
        if not is_causal and varlen is None:
            mask = layout.attention_mask(k.shape[2])
        if weights is None:
            return attention(
                q, k, v, is_causal=is_causal, mask=mask, varlen=varlen, backend=self.backend
            )
        weights.append(attention_weights(q, k, is_causal=is_causal, mask=mask).to(v.dtype))
        return weights[-1] @ v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
