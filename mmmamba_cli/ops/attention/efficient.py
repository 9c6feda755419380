"""PyTorch's memory-efficient attention over variable-length sequences, for fp32.

`F.scaled_dot_product_attention` has no fused kernel for fp32 with grouped heads: it stores the
scores of all query heads. This kernel stores none, and takes the boundaries of the sequences
instead of a mask. Legend: B batch, T columns, H query heads, K key/value heads, P head dim.

Source: Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, arXiv 2112.05682.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.ops.attention.flash import autocast_dtype
from mmmamba_cli.ops.attention.key_chunks import KeyChunks, chunked_gradients, key_chunks
from mmmamba_cli.ops.attention.varlen import VarlenMetadata

HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 4, 256
# Gradients of q, k and v.
Gradients = tuple[Tensor, Tensor, Tensor]
# PyTorch's number of a causal mask that is aligned at the upper left.
CAUSAL = 1


def supports_efficient(q: Tensor) -> bool:
    """Whether the kernel supports q (..., P): fp32 on an NVIDIA GPU."""
    dim = q.shape[-1]
    if not q.is_cuda or autocast_dtype(q) != torch.float32:
        return False
    if dim % HEAD_DIM_MULTIPLE or dim > MAX_HEAD_DIM:
        return False
    return torch.backends.cuda.mem_efficient_sdp_enabled() and _is_available(q.device)


@cache
def _is_available(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    varlen: VarlenMetadata | None,
) -> Tensor:
    """Compute `ops.attention` for `is_causal` or `varlen`.

    Raises:
        NotImplementedError: a mask, or inputs for which `supports_efficient` is False.
    """
    if mask is not None or not (is_causal or varlen is not None):
        raise NotImplementedError("memory-efficient attention takes causal sequences, not a mask")
    if not supports_efficient(q):
        raise NotImplementedError(
            "memory-efficient attention takes fp32 on an NVIDIA GPU and head dims that are "
            f"multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}, not {autocast_dtype(q)} of "
            f"{q.shape[-1]} on {q.device}"
        )
    batch, heads, length, _ = q.shape
    q, k, v = (_per_query_head(x, heads).transpose(1, 2) for x in (q, k, v))
    if varlen is None:
        bounds = tuple(length * row for row in range(batch + 1))
        y: Tensor = _Efficient.apply(q, k, v, None, length, bounds)
    else:
        # The kernel reads the sequences of one long row.
        flat = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
        y = _Efficient.apply(*flat, varlen.cu_seqlens, varlen.max_seqlen, varlen.bounds)
        y = y.squeeze(0).unflatten(0, (batch, length))
    return y.transpose(1, 2)


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """(B, K, T, P) -> (B, H, T, P) fp32."""
    x = x.float()
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


class _Efficient(torch.autograd.Function):
    """Causal attention of q, k, v (B, T, H, P).

    With `cu_seqlens` (N + 1,), B = 1 and the N sequences follow one another. `bounds` are the
    boundaries of the sequences among all B * T columns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        bounds: tuple[int, ...],
    ) -> Tensor:
        # max_seqlen is an argument only beside cu_seqlens.
        longest = None if cu_seqlens is None else max_seqlen
        y, logsumexp, *random, _, _ = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, cu_seqlens, cu_seqlens, longest, longest, 0.0, CAUSAL, True
        )
        ctx.save_for_backward(q, k, v, y, logsumexp, cu_seqlens, *random)
        ctx.max_seqlen, ctx.bounds = max_seqlen, bounds
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logsumexp, cu_seqlens, *random = ctx.saved_tensors
        chunks = key_chunks(ctx.bounds, q.device)
        if chunks is None:
            ends, longest = (cu_seqlens, cu_seqlens), (ctx.max_seqlen, ctx.max_seqlen)
            dy = dy.contiguous()
            whole = _gradients(dy, q, k, v, y, ends, longest, logsumexp, random)
            return *whole, None, None, None

        def kernel(
            dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, chunks: KeyChunks, lse: Tensor
        ) -> Gradients:
            ends = chunks.cu_queries, chunks.cu_keys
            longest = chunks.max_queries, chunks.max_keys
            dy, q, k, v, y = (x.unsqueeze(0) for x in (dy, q, k, v, y))
            dq, dk, dv = _gradients(dy, q, k, v, y, ends, longest, lse, random)
            return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)

        rows = q.shape[:2]
        dy, q, k, v, y = (x.flatten(0, 1) for x in (dy, q, k, v, y))
        flat = chunked_gradients(kernel, dy, q, k, v, y, chunks, logsumexp)
        return *(x.unflatten(0, rows) for x in flat), None, None, None


def _gradients(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    max_seqlens: tuple[int, int],
    logsumexp: Tensor,
    random: list[Tensor],
) -> Gradients:
    """Gradients of q, k, v (B, T, H, P). `cu_seqlens`, `max_seqlens`: of queries and of keys."""
    # One split of the keys, so that the gradient of q is a sum in a fixed order. A sequence and
    # head is then the work of one block.
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        dy, q, k, v, None, y, *cu_seqlens, *max_seqlens, logsumexp, 0.0, *random, CAUSAL, False,
        num_splits_key=1,
    )  # fmt: skip
    return dq, dk, dv
