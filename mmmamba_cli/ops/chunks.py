"""Chunks of tokens, sums of log decays within them, and the recurrence across them.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N key dim, c chunks of
Q tokens each.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_layout(length: int, chunk_size: int) -> tuple[int, int]:
    """The number of chunks of `length` tokens, and their size, at most `chunk_size`."""
    num_chunks = (length + chunk_size - 1) // chunk_size
    # Equal chunks, rounded up to a multiple of 8 for the matmuls, need the least padding.
    tokens_per_chunk = (length + num_chunks - 1) // num_chunks
    return num_chunks, min(chunk_size, length, tokens_per_chunk + -tokens_per_chunk % 8)


def in_chunks(tokens: Tensor, num_chunks: int, size: int) -> Tensor:
    """(B, T, heads, ...) -> (B, c, heads, Q, ...), zero-padded at the end."""
    padding = num_chunks * size - tokens.shape[1]
    if padding:
        tokens = F.pad(tokens, (0, 0) * (tokens.dim() - 2) + (0, padding))
    return tokens.unflatten(1, (num_chunks, size)).transpose(2, 3)


def by_kv_head(rows: Tensor, kv_heads: int) -> Tensor:
    """(B, c, H, rows, columns) -> (B, c, K, G * rows, columns): one matmul per key/value head."""
    return rows.unflatten(2, (kv_heads, -1)).flatten(3, 4)


class LogDecays(NamedTuple):
    """Sums of log decays over parts of a chunk, of shape (B, c, H, ...); -inf at masked paths."""

    from_start: Tensor  # (..., Q): over k <= i
    within: Tensor  # (..., Q, Q): over j < k <= i at [i, j], -inf for j > i
    to_end: Tensor  # (..., Q): over k > j


def log_decays(log_decay: Tensor) -> LogDecays:
    """Sums over parts of chunks of `log_decay` (B, c, H, Q).

    Each sum is accumulated separately (segsum of arXiv 2405.21060, listing 1). A difference of two
    cumulative sums loses precision after a strong decay, and its gradient loses more.
    """
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    after = log_decay.unsqueeze(-1).expand(*log_decay.shape, size)
    within = after.masked_fill(ones.triu(), 0).cumsum(-2)
    # Mask before exp: a masked exponential that overflows would make the gradient NaN.
    within = within.masked_fill_(ones.triu(1), -math.inf)
    to_end = F.pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return LogDecays(log_decay.cumsum(-1), within, to_end)


def scan_chunks(state: Tensor, decay: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Initial states of all chunks (B, c, H, P, N) and the final state (B, H, P, N).

    `decay` (B, c, H, 1, 1 or N) is the decay over a whole chunk; `added` (B, c, H, P, N) is the
    contribution of the chunk's tokens to the state at its end.
    """
    entering = []
    for decay_c, added_c in zip(decay.unbind(1), added.unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(added_c, decay_c, state)
    return torch.stack(entering, dim=1), state
