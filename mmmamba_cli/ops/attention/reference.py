"""Attention as it is written down, and by PyTorch's own function.

Legend: B batch, T queries, S keys, H query heads, K key/value heads, P head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.attention.varlen import Segments


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    segments: Segments | None,
) -> Tensor:
    """All T x S scores, in fp64."""
    weights = softmax_weights(q, k, is_causal=is_causal, mask=mask, segments=segments)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return weights.to(v.dtype) @ v


def softmax_weights(
    q: Tensor,
    k: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    segments: Segments | None,
) -> Tensor:
    """softmax(q k^T / sqrt(P)), (B, H, T, S) fp64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).double() / math.sqrt(q.shape[-1])
    seen = _seen(q, is_causal, mask, segments)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return torch.softmax(scores, dim=-1)


def scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    segments: Segments | None,
) -> Tensor:
    """By whichever of its kernels PyTorch takes."""
    if segments is not None:
        mask = segments.mask(len(q))
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped
    )


def _seen(
    q: Tensor, is_causal: bool, mask: Tensor | None, segments: Segments | None
) -> Tensor | None:
    if segments is not None:
        return segments.mask(len(q))
    if is_causal:
        return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return mask
