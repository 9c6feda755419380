"""One decoding step of a mixer in plain PyTorch: any device, with autograd, no synchronization.

Legend as in `ops.decode`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.ops.conv import reference as conv
from mmmamba_cli.ops.ssd import reference as ssd

if TYPE_CHECKING:
    from mmmamba_cli.ops.decode.delta_step import DeltaWeights
    from mmmamba_cli.ops.decode.mamba_step import MixerWeights


def mixer_step(
    vkq: Tensor,
    dt: Tensor,
    conv_ring: Tensor,
    ssm_state: Tensor,
    position: Tensor,
    weights: MixerWeights,
    *,
    inputs_ready: bool,
) -> Tensor:
    """Shapes as in `ops.mixer_step`; `inputs_ready` has no effect."""
    v, k, q = convolve_token(vkq, conv_ring, position, weights, ssm_state.shape)
    y, state = ssd.step(
        v,
        dt,
        weights.A,
        k,
        q,
        # Autograd needs the state from before the in-place update.
        ssm_state.clone(),
        dt_bias=weights.dt_bias,
        dt_softplus=True,
        D=weights.D,
    )
    ssm_state.copy_(state)
    conv_ring.index_copy_(-1, position % conv_ring.shape[-1], vkq.unsqueeze(-1).to(conv_ring.dtype))
    return y


def convolve_token(
    vkq: Tensor,
    conv_ring: Tensor,
    position: Tensor,
    weights: MixerWeights | DeltaWeights,
    state_shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """v (B, K, P), k (B, K, N) and q (B, H, N) after convolution and SiLU; reads the ring only.

    `state_shape` is (B, H, P, N).
    """
    _, heads, value_dim, state_dim = state_shape
    kv_heads = (vkq.shape[1] - heads * state_dim) // (value_dim + state_dim)
    taps = conv_ring.shape[-1]
    # The slot after the token's own holds the oldest input.
    before = (position + torch.arange(1, taps, device=position.device)) % taps
    past = conv_ring.index_select(-1, before)
    mixed, _ = conv.step(vkq, weights.conv_weight, weights.conv_bias, past, activation="silu")
    v, k, q = mixed.split((kv_heads * value_dim, kv_heads * state_dim, heads * state_dim), dim=-1)
    return (
        v.unflatten(-1, (kv_heads, value_dim)),
        k.unflatten(-1, (kv_heads, state_dim)),
        q.unflatten(-1, (heads, state_dim)),
    )


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    starts: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Shapes as in `ops.attention_step`. Scores all columns and masks invalid ones."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    keys.index_copy_(2, position, k.unsqueeze(2).to(keys.dtype))
    values.index_copy_(2, position, v.unsqueeze(2).to(values.dtype))
    columns = torch.arange(keys.shape[2], device=keys.device)
    seen = (columns <= position).expand(q.shape[0], -1)
    if starts is not None:
        seen = seen & (columns >= starts.unsqueeze(1))
    mask = seen[:, None, None, :]
    y = F.scaled_dot_product_attention(
        q.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=q.shape[1] != keys.shape[1]
    )
    return y.flatten(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x (B, heads, P) with rotated halves."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def greedy_argmax(logits: Tensor, suppressed: Tensor) -> Tensor:
    """Shapes as in `ops.greedy_argmax`."""
    return upcast(logits).masked_fill(suppressed, -math.inf).argmax(-1)
