"""The state of a sliding window: keys and values of the first and of the newest tokens.

The ordinal of a token is its index 0, 1, 2, ... among the real tokens of its sequence. Legend: B
batch, T columns, K key/value heads, P head dim, F first tokens (`sinks`), W window.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class WindowState(NamedTuple):
    """Keys and values that later queries can see, after `counts` tokens.

    keys, values: (B, K, F + W, P). Slot j < F has the token of ordinal j. Slot F + r has the newest
        token whose ordinal o satisfies o mod W = r. Slots without a token are finite.
    counts: (B,) int64, real tokens so far.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor


def empty_state(k: Tensor, v: Tensor, window: int, sinks: int) -> WindowState:
    """The state before the first token of k and v (B, K, T, P)."""
    batch, kv_heads, _, dim = k.shape
    shape = (batch, kv_heads, sinks + window, dim)
    counts = torch.zeros(batch, dtype=torch.long, device=k.device)
    return WindowState(k.new_zeros(shape), v.new_zeros(shape), counts)


def slot_ordinals(counts: Tensor, window: int, sinks: int) -> Tensor:
    """Ordinal of the token in each slot after `counts` (B,) tokens, negative if there is none.

    Returns (B, F + W) int64.
    """
    counts = counts.unsqueeze(1)
    slots = torch.arange(-sinks, window, device=counts.device)
    newest = counts - 1
    ring = newest - (newest - slots) % window
    first = torch.where(slots + sinks < counts, slots + sinks, -1)
    return torch.where(slots < 0, first, ring)


def slots_in_use(ordinals: Tensor, sinks: int) -> Tensor:
    """Whether queries read each slot, (B, F + W) bool, from `slot_ordinals`.

    The first F tokens are in the ring too while they are new; queries read them from their own
    slots only.
    """
    slots = torch.arange(ordinals.shape[1], device=ordinals.device)
    return ordinals >= torch.where(slots < sinks, 0, sinks)


def real_columns(mask: Tensor) -> Tensor:
    """Column numbers of each row, real ones first, each kind in order; (B, T) int64."""
    return mask.bool().logical_not().byte().argsort(dim=1, stable=True)


def next_state(
    k: Tensor, v: Tensor, past: WindowState, mask: Tensor | None, sinks: int
) -> WindowState:
    """The state after the columns of k and v (B, K, T, P), of which `mask` (B, T) are real."""
    batch, _, length, _ = k.shape
    slots = past.keys.shape[2]
    counts = past.counts + (length if mask is None else mask.bool().sum(1))
    ordinals = slot_ordinals(counts, slots - sinks, sinks)
    # A token from before this call stays in its slot, and an empty slot stays as it is.
    source = torch.arange(slots, device=k.device).expand(batch, -1)
    if length > 0:
        columns = (ordinals - past.counts.unsqueeze(1)).clamp(0, length - 1)
        if mask is not None:
            columns = real_columns(mask).gather(1, columns)
        source = torch.where(ordinals < past.counts.unsqueeze(1), source, slots + columns)

    def select(before: Tensor, new: Tensor) -> Tensor:
        return select_columns(torch.cat((before, new.to(before.dtype)), dim=2), source)

    return WindowState(select(past.keys, k), select(past.values, v), counts)


def select_columns(x: Tensor, columns: Tensor) -> Tensor:
    """x (B, K, S, P) at `columns` (B or 1, N) of the rows, (B, K, N, P).

    The gradient of indexing is a sum in fixed order on a GPU, that of `gather` is not.
    """
    rows = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x.transpose(1, 2)[rows, columns].transpose(1, 2)
