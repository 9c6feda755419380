"""Mamba-2 mixer that replaces attention (mmMamba, arXiv 2502.13145, section 3).

W_Q -> C, W_K -> B, W_V -> x and W_O come from the teacher, with its biases and its norm on q and k
if present. New are the decay and input step dt, a short convolution over [v, k, q], and a gated
norm on the output. Legend: B batch, T tokens, H query heads, K key/value heads shared by H / K
query heads each, P head dim = state dim, W conv width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from mmmamba_cli.model.attention import query_key_products
from mmmamba_cli.model.cache import read_ssm_state, write_ssm_state
from mmmamba_cli.model.config import MixerConfig, StackConfig
from mmmamba_cli.model.norm import GatedRMSNorm, RMSNorm
from mmmamba_cli.model.rope import apply_rope
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops import causal_conv, ssd
from mmmamba_cli.ops.backends import upcast

GATED_NORM_EPS = 1e-5


class CausalConv(nn.Conv1d):
    """Depthwise causal convolution and SiLU over the channels of [v, k, q], (B, T, channels).

    A separate module, so that hooks that move weights to a device (accelerate) see its call.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, layout: SequenceLayout, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return causal_conv(
            x,
            self.weight.squeeze(1),
            self.bias,
            initial_state=state,
            mask=layout.mask,
            seq_idx=layout.seq_idx,
        )


class Mamba2(nn.Module):
    """Selective state-space mixer, (B, T, D) -> (B, T, D); `mix` omits W_O.

    S_t = exp(-dt_t exp(A_log)) S_{t-1} + dt_t v_t k_t^T and y_t = S_t q_t, with
    dt = softplus(x W_dt + dt_bias); the state (B, H, P, P) is fp32 for weights of any dtype.
    """

    def __init__(self, hidden_size: int, stack: StackConfig, options: MixerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = stack.num_heads
        self.num_kv_heads = stack.num_kv_heads
        self.head_dim = stack.head_dim
        self.rope = options.rope
        self.width = stack.num_heads * stack.head_dim
        self.kv_width = stack.num_kv_heads * stack.head_dim
        channels = self.width + 2 * self.kv_width
        self.q_proj = nn.Linear(hidden_size, self.width, bias=stack.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, self.kv_width, bias=stack.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, self.kv_width, bias=stack.qkv_bias)
        self.o_proj = nn.Linear(self.width, hidden_size, bias=stack.output_bias)
        self.g_proj = nn.Linear(hidden_size, self.width, bias=False)
        self.dt_proj = nn.Linear(hidden_size, stack.num_heads, bias=False)
        self.conv1d = CausalConv(channels, channels, options.conv_width, groups=channels)
        self.A_log = nn.Parameter(torch.ones(stack.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(stack.num_heads))
        self.g_norm = GatedRMSNorm(stack.head_dim, GATED_NORM_EPS)
        self.D = nn.Parameter(torch.zeros(stack.num_heads)) if options.d_skip else None
        qk_norm = options.qk_norm or stack.qk_norm
        self.q_norm = RMSNorm(stack.head_dim, stack.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(stack.head_dim, stack.rms_norm_eps) if qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Apply the mixer. `weights` is ignored: it collects the softmax of attention layers."""
        return self.o_proj(self.mix(hidden, layout, cache))

    def mix(self, hidden: Tensor, layout: SequenceLayout, cache: Cache | None = None) -> Tensor:
        """Compute the gated, normed read-out before W_O, (B, T, H * P)."""
        batch, length, _ = hidden.shape
        conv_state, ssm_state = read_ssm_state(cache, self.layer_idx)
        v, k, q, conv_state = self.values_keys_queries(hidden, layout, conv_state)
        y, ssm_state = ssd(
            v,
            self.dt_proj(hidden),
            -torch.exp(self.A_log),
            k,
            q,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            D=self.D,
            initial_state=ssm_state,
            mask=layout.mask,
            seq_idx=layout.seq_idx,
        )
        write_ssm_state(cache, self.layer_idx, conv_state, ssm_state)
        gate = self.g_proj(hidden).view(batch, length, self.num_heads, self.head_dim)
        return self.g_norm(y, gate).reshape(batch, length, self.width)

    def values_keys_queries(
        self, hidden: Tensor, layout: SequenceLayout, conv_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """v and k (B, T, K, P), q (B, T, H, P), the inputs of the scan, and the conv state."""
        batch, length, _ = hidden.shape
        vkq = torch.cat((self.v_proj(hidden), self.k_proj(hidden), self.q_proj(hidden)), dim=-1)
        vkq, conv_state = self.conv1d(vkq, layout, conv_state)
        v, k, q = vkq.split((self.kv_width, self.kv_width, self.width), dim=-1)
        v = v.view(batch, length, self.num_kv_heads, self.head_dim)
        k = k.view(batch, length, self.num_kv_heads, self.head_dim)
        q = q.view(batch, length, self.num_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q = apply_rope(q, layout.cos, layout.sin)
            k = apply_rope(k, layout.cos, layout.sin)
        return v, k, q, conv_state

    def mixing_matrix(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        """Matrix that maps values to read-outs, (B, H, T, T) fp32 (arXiv 2405.21060, section 4).

        (q_t . k_s) exp(sum_{s < r <= t} dt_r A) dt_s, and 0 at masked keys.
        """
        _, k, q, _ = self.values_keys_queries(hidden, layout)
        dt = F.softplus(upcast(self.dt_proj(hidden)) + self.dt_bias).transpose(1, 2)
        if layout.mask is not None:
            # Padding neither writes to the state nor decays it.
            dt = dt * layout.mask.unsqueeze(1)
        decay = (dt * -torch.exp(self.A_log).unsqueeze(-1)).cumsum(-1)
        passed = decay.unsqueeze(-1) - decay.unsqueeze(-2)
        passed = passed.masked_fill(~layout.visible_keys(), -math.inf).exp()
        return query_key_products(upcast(q), upcast(k)) * passed * dt.unsqueeze(-2)
