"""Products of queries and keys under one decay per key channel, without overflow.

The factor of channel n between the tokens j <= i is exp(g_{j+1} + ... + g_i) with log decays
g <= 0. Written as exp(c_i) exp(-c_j) with cumulative sums c, the second factor overflows. Here
neighbouring blocks of tokens are joined, from single tokens to the whole chunk: between two blocks
the exponent is split at their border, where both parts are sums of log decays and both factors are
at most 1. The products of Q tokens take log2(Q) matmuls.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DecayedBlock(NamedTuple):
    """A block of Q tokens with R rows, for example query and key, and one key per token.

    products: (..., Q, R, Q), sum_n rows[i, r, n] k[j, n] exp(sum_{j < l <= i} log_decay[l, n]) at
        [i, r, j], 0 for j > i.
    rows: (..., Q, R, N), rows under the decay from the block's start, the token's own included.
    keys: (..., Q, N), keys under the decay to the block's end.
    log_decay: (..., N), over the whole block.
    """

    products: Tensor
    rows: Tensor
    keys: Tensor
    log_decay: Tensor


def decayed_heads(rows: Tensor, keys: Tensor, log_decay: Tensor) -> DecayedBlock:
    """The blocks of all chunks and query heads; leading dimensions (B, c, H).

    rows (B, c, K, G, Q, R, N), keys (B, c, K, Q, N), log_decay (B, c, H, Q, N), where H = K G;
    B and c may be swapped.
    """
    grouped = log_decay.unflatten(2, (keys.shape[2], -1))
    block = decayed_block(rows, keys.unsqueeze(3), grouped)
    return DecayedBlock(*(part.flatten(2, 3) for part in block))


def decayed_block(rows: Tensor, keys: Tensor, log_decay: Tensor) -> DecayedBlock:
    """The block of tokens with rows (..., Q, R, N), keys (..., Q, N) and log decays (..., Q, N).

    Log decays are at most 0; -inf separates the tokens before from those after. Leading dimensions
    of `keys` may broadcast.
    """
    size = log_decay.shape[-2]
    border = 1 << (size.bit_length() - 1)
    if border < size:
        return _joined(
            decayed_block(
                rows[..., :border, :, :], keys[..., :border, :], log_decay[..., :border, :]
            ),
            decayed_block(
                rows[..., border:, :, :], keys[..., border:, :], log_decay[..., border:, :]
            ),
        )
    # A dimension of blocks before that of tokens: Q blocks of one token, then pairs of neighbours.
    blocks = DecayedBlock(
        (rows * keys.unsqueeze(-2)).sum(-1)[..., None, :, None],
        (rows * log_decay.exp().unsqueeze(-2)).unsqueeze(-3),
        keys.expand_as(log_decay).unsqueeze(-2),
        log_decay,
    )
    while blocks.log_decay.shape[-2] > 1:
        pairs = (
            blocks.products.unflatten(-4, (-1, 2)).unbind(-4),
            blocks.rows.unflatten(-4, (-1, 2)).unbind(-4),
            blocks.keys.unflatten(-3, (-1, 2)).unbind(-3),
            blocks.log_decay.unflatten(-2, (-1, 2)).unbind(-2),
        )
        blocks = _joined(*(DecayedBlock(*parts) for parts in zip(*pairs, strict=True)))
    return DecayedBlock(
        blocks.products.squeeze(-4),
        blocks.rows.squeeze(-4),
        blocks.keys.squeeze(-3),
        blocks.log_decay.squeeze(-2),
    )


def _joined(first: DecayedBlock, second: DecayedBlock) -> DecayedBlock:
    across = second.rows.flatten(-3, -2) @ first.keys.mT
    below = torch.cat((across.unflatten(-2, second.rows.shape[-3:-1]), second.products), -1)
    above = F.pad(first.products, (0, second.products.shape[-1]))
    # Sums of log decays: products of many rounded decays near 1 would lose precision.
    since_first = first.log_decay.exp()[..., None, None, :]
    until_end = second.log_decay.exp().unsqueeze(-2)
    return DecayedBlock(
        torch.cat((above, below), -3),
        torch.cat((first.rows, second.rows * since_first), -3),
        torch.cat((first.keys * until_end, second.keys), -2),
        first.log_decay + second.log_decay,
    )
