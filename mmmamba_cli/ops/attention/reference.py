"""Attention in plain PyTorch: eager with all scores, and `F.scaled_dot_product_attention`.

Legend: B batch, T queries, S keys, H query heads, K key/value heads, P head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.attention.varlen import VarlenMetadata


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    varlen: VarlenMetadata | None,
) -> Tensor:
    """Compute all T x S scores in fp64; arguments as in `ops.attention`."""
    weights = softmax_weights(q, k, is_causal=is_causal, mask=mask, varlen=varlen)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return weights.to(v.dtype) @ v


def softmax_weights(
    q: Tensor,
    k: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    varlen: VarlenMetadata | None,
) -> Tensor:
    """softmax(q k^T / sqrt(P)), (B, H, T, S) fp64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).double() / math.sqrt(q.shape[-1])
    allowed = _attention_mask(q, is_causal, mask, varlen)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return torch.softmax(scores, dim=-1)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    varlen: VarlenMetadata | None,
) -> Tensor:
    """Call PyTorch's function, which selects the kernel; arguments as in `ops.attention`."""
    if varlen is not None:
        mask = varlen.mask(len(q))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attention_mask(
    q: Tensor, is_causal: bool, mask: Tensor | None, varlen: VarlenMetadata | None
) -> Tensor | None:
    """(B or 1, 1, T, S) bool or a broadcastable shape, True where a query may attend."""
    if varlen is not None:
        return varlen.mask(len(q))
    if is_causal:
        return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return mask
