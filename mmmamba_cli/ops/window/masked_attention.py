"""Masked softmax attention with an optional learned logit per head that has no key and no value.

Source of the logits: gpt-oss (OpenAI), arXiv 2508.10925. Legend: N batch, H query heads, K
key/value heads, C queries, L keys, P head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sink_logits: Tensor | None
) -> Tensor:
    """Attention of q (N, H, C, P) over k and v (N, K, L, P) by PyTorch's fused function.

    `seen` (N, C, L) is True where a query attends, to at least one key; `sink_logits` is (H,).
    """
    batch, heads, queries, dim = q.shape
    kv_heads = k.shape[1]
    group_size = heads // kv_heads
    # The heads of a group become queries of one head: the memory-efficient kernel does not support
    # grouped heads.
    q = q.reshape(batch, kv_heads, group_size * queries, dim)
    if sink_logits is None:
        mask = seen.unsqueeze(1).repeat(1, 1, group_size, 1)
    else:
        # A zero key and value at the end; its score is the mask's last column.
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -math.inf)
        bias = bias.unsqueeze(1).expand(-1, heads, -1, -1)
        logits = sink_logits.to(q.dtype).view(1, heads, 1, 1).expand(batch, -1, queries, -1)
        mask = torch.cat((bias, logits), dim=-1).view(batch, kv_heads, group_size * queries, -1)
        if mask.requires_grad and not (q.requires_grad or k.requires_grad or v.requires_grad):
            # Only then does PyTorch's CUDA kernel keep what the gradient of the mask needs
            # (torch 2.11: "LSE is not correctly aligned"). Stage 1 learns the logits alone.
            q = q.detach().requires_grad_()
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.reshape(batch, heads, queries, dim)


def softmax_with_sink(scores: Tensor, seen: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax of scores (N, H, C, L) over the keys in `seen` (N, C, L), 0 at the others."""
    scores = scores.masked_fill(~seen.unsqueeze(1), -math.inf)
    if sink_logits is None:
        return torch.softmax(scores, dim=-1)
    logits = sink_logits.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores, logits), dim=-1), dim=-1)[..., :-1]
