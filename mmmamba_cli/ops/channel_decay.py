"""Products of queries and keys under one decay per key channel, without overflow.

The factor of channel n between the tokens j <= i is exp(g_{j+1} + ... + g_i) with log decays
g <= 0. Written as exp(c_i) exp(-c_j) with cumulative sums c, the second factor overflows. Here each
block of tokens is halved: between its halves, the exponent is split at their border, where both
parts are sums of log decays and both factors are at most 1. The halves are halved in turn, so the
products of Q tokens take log2(Q) matmuls.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def from_start(log_decay: Tensor) -> Tensor:
    """Log decays (..., Q, N) summed over tokens k <= i."""
    return log_decay.cumsum(-2)


def to_end(log_decay: Tensor) -> Tensor:
    """Log decays (..., Q, N) summed over tokens k > j."""
    return F.pad(log_decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def decayed_products(rows: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """sum_n rows[i, r, n] k[j, n] exp(sum_{j < l <= i} log_decay[l, n]) at [i, r, j], 0 for j > i.

    Args:
        rows: (..., Q, R, N), R rows per token.
        k: (..., Q, N); leading dimensions may broadcast to those of `rows`.
        log_decay: (..., Q, N), at most 0; -inf separates the tokens before from those after.

    Returns:
        (..., Q, R, Q).
    """
    size = k.shape[-2]
    border = 1 << (size.bit_length() - 1)
    first = _products_of_halves(rows[..., :border, :, :], k[..., :border, :], log_decay)
    if border == size:
        return first
    rows, after = rows[..., border:, :, :], log_decay[..., border:, :]
    across = _products_across(rows, k[..., :border, :], log_decay[..., :border, :], after)
    return _lower_blocks(first, across, decayed_products(rows, k[..., border:, :], after))


def _products_of_halves(rows: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """`decayed_products` of the first Q tokens of `log_decay`, Q a power of 2."""
    size = k.shape[-2]
    log_decay = log_decay[..., :size, :]
    blocks = (rows * k.unsqueeze(-2)).sum(-1)[..., None, :, None]
    half = 1
    while half < size:
        before, after = log_decay.unflatten(-2, (-1, 2, half)).unbind(-3)
        across = _products_across(
            rows.unflatten(-3, (-1, 2, half))[..., 1, :, :, :],
            k.unflatten(-2, (-1, 2, half))[..., 0, :, :],
            before,
            after,
        )
        first, second = blocks.unflatten(-4, (-1, 2)).unbind(-4)
        blocks = _lower_blocks(first, across, second)
        half *= 2
    return blocks.squeeze(-4)


def _products_across(rows: Tensor, k: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Products of rows (..., I, R, N) with the keys (..., J, N) of a block before, (..., I, R, J).

    `before` (..., J, N) and `after` (..., I, N) are the log decays of the two blocks.
    """
    read = rows * from_start(after).exp().unsqueeze(-2)
    written = k * to_end(before).exp()
    return (read.flatten(-3, -2) @ written.mT).unflatten(-2, rows.shape[-3:-1])


def _lower_blocks(first: Tensor, across: Tensor, second: Tensor) -> Tensor:
    """[[first, 0], [across, second]] over the dimensions -3 and -1."""
    above = F.pad(first, (0, second.shape[-1]))
    return torch.cat((above, torch.cat((across, second), -1)), -3)
