"""Sliding-window attention by blocks of queries, in time and memory linear in the tokens.

A block of C queries attends to the first tokens of its sequence, the window before the block and
the block itself. Legend: B batch, T columns, H query heads, K key/value heads, P head dim, F first
tokens (`sinks`), W window, N blocks of C columns, L columns of a block and before it.

The *coordinate* of a key is its column in this call; the past token of ordinal o among n has
coordinate o - n < 0. Tokens of a sequence have consecutive coordinates once padding is at the end,
so the coordinate `start` of ordinal 0 describes a query's sequence completely.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.window.inputs import WindowInputs
from mmmamba_cli.ops.window.masked_attention import masked_attention
from mmmamba_cli.ops.window.state import real_columns, select_columns


def blocked(inputs: WindowInputs) -> Tensor:
    """Attend by blocks of `inputs.block_size` queries; padding is moved to the end meanwhile."""
    if inputs.mask is None:
        return _attend(inputs)
    mask = inputs.mask.bool()
    columns, padding = real_columns(mask), ~mask[:, None, :, None]
    q, k, v = (
        select_columns(x.masked_fill(padding, 0), columns) for x in (inputs.q, inputs.k, inputs.v)
    )
    seq_idx = inputs.seq_idx
    if seq_idx is not None:
        seq_idx = seq_idx.gather(1, columns)
    y = _attend(replace(inputs, q=q, k=k, v=v, mask=None, seq_idx=seq_idx))
    return select_columns(y, columns.argsort(1)).masked_fill(padding, 0)


def _attend(inputs: WindowInputs) -> Tensor:
    """Attend in rows whose padding, if any, is at the end; its y is undefined and finite."""
    blocks = _Blocks.of(inputs)
    past = inputs.past
    k = blocks.keys(inputs.k, None if past is None else past.keys)
    v = blocks.keys(inputs.v, None if past is None else past.values)
    seen = blocks.seen().expand(len(inputs.q), -1, -1, -1).flatten(0, 1)
    y = masked_attention(blocks.queries(inputs.q), k, v, seen, inputs.sink_logits)
    y = y.unflatten(0, (len(inputs.q), blocks.count)).transpose(1, 2).flatten(2, 3)
    return y[:, :, : inputs.q.shape[2]]


@dataclass(frozen=True)
class _Blocks:
    """N blocks of `size` columns, the last one padded by `tail`.

    lead: columns before a block that it attends to.
    first: number of first tokens that are keys of their own; 0 if `lead` reaches all tokens.
    start: (B or 1, N or 1, C or 1), the coordinate of ordinal 0 of each query's sequence.
    counts: (B,), tokens of the past; None without a past.
    """

    size: int
    count: int
    tail: int
    lead: int
    first: int
    window: int
    sinks: int
    start: Tensor
    counts: Tensor | None

    @classmethod
    def of(cls, inputs: WindowInputs) -> _Blocks:
        length, window, sinks = inputs.q.shape[2], inputs.window, inputs.sinks
        size = min(inputs.block_size, length)
        count = -(-length // size)
        tail = count * size - length
        start = _sequence_starts(inputs)
        if inputs.seq_idx is None:
            start = start.unsqueeze(-1)
        else:
            start = F.pad(start, (0, tail)).unflatten(1, (count, size))
        if inputs.past is not None:
            lead, first, counts = window - 1, sinks, inputs.past.counts
        else:
            last_start = (count - 1) * size
            lead, counts = min(window - 1, last_start), None
            first = min(sinks, length) if lead < last_start else 0
        return cls(size, count, tail, lead, first, window, sinks, start, counts)

    def queries(self, q: Tensor) -> Tensor:
        """q (B, H, T, P) as (B * N, H, C, P)."""
        q = _pad_columns(q, 0, self.tail).unflatten(2, (self.count, self.size))
        return q.transpose(1, 2).flatten(0, 1)

    def keys(self, new: Tensor, past: Tensor | None) -> Tensor:
        """The keys of each block, (B * N, K, first + L, P), from the new ones (B, K, T, P).

        `past` (B, K, F + W, P) are those of the state. Values are handled in the same way.
        """
        if past is None:
            first, timeline = new[:, :, :0], _pad_columns(new, self.lead, self.tail)
        else:
            first, ring = past.to(new.dtype).split((self.sinks, self.window), dim=2)
            timeline = torch.cat((self._in_order(ring), new), dim=2)
            timeline = _pad_columns(timeline, 0, self.tail)
        blocks = timeline.unfold(2, self.lead + self.size, self.size)
        blocks = blocks.permute(0, 2, 1, 4, 3)
        if self.first > 0:
            first = self._first_tokens(first, new).expand(-1, self.count, -1, -1, -1)
            blocks = torch.cat((first, blocks), dim=3)
        return blocks.flatten(0, 1)

    def _in_order(self, ring: Tensor) -> Tensor:
        """The newest W - 1 past tokens, oldest first, from the ring (B, K, W, P)."""
        assert self.counts is not None
        ordinals = self.counts.unsqueeze(1) + torch.arange(1 - self.window, 0, device=ring.device)
        return select_columns(ring, ordinals % self.window)

    def _first_tokens(self, past: Tensor, new: Tensor) -> Tensor:
        """The first tokens of the sequence of each block's first query, (B, N or 1, K, first, P).

        `past` (B, K, F or 0, P) are the first tokens in the state. Tokens that do not exist have
        arbitrary keys.
        """
        tokens = torch.cat((past, new), dim=2)
        ordinals = torch.arange(self.first, device=new.device)
        coordinates = self.start[:, :, :1] + ordinals
        index = torch.where(coordinates < 0, ordinals, past.shape[2] + coordinates)
        index = index.clamp(max=tokens.shape[2] - 1)
        found = select_columns(tokens, index.flatten(1))
        return found.unflatten(2, index.shape[1:]).transpose(1, 2)

    def seen(self) -> Tensor:
        """(B or 1, N, C, first + L) bool, True where a query attends to a key of its block."""
        device = self.start.device
        begin = torch.arange(self.count, device=device)[:, None, None] * self.size
        i = begin + torch.arange(self.size, device=device)[:, None]
        j = begin + torch.arange(-self.lead, self.size, device=device)
        start = self.start.unsqueeze(-1)
        end = start + self.sinks
        seen = (j <= i) & (j >= start) & ((j > i - self.window) | (j < end))
        if self.counts is not None:
            # The state has the first tokens in the ring too while they are new.
            seen = seen & ((j >= 0) | (j >= end))
        seen = seen.expand(-1, self.count, self.size, -1)
        if self.first == 0:
            return seen
        block_start = start[:, :, :1]
        j = block_start + torch.arange(self.first, device=device)
        first = (start == block_start) & ((j < 0) | (j < begin - self.lead))
        return torch.cat((first.expand(len(seen), self.count, self.size, -1), seen), dim=-1)


def _sequence_starts(inputs: WindowInputs) -> Tensor:
    """The coordinate of ordinal 0 of each column's sequence, (B or 1, T), or (B or 1, 1)."""
    seq_idx = inputs.seq_idx
    if inputs.past is not None:
        first = -inputs.past.counts.unsqueeze(1)
    else:
        first = torch.zeros(1, 1, dtype=torch.long, device=inputs.q.device)
    if seq_idx is None:
        return first
    begins = torch.zeros_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    columns = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    return torch.where(begins, columns, first).cummax(1).values


def _pad_columns(x: Tensor, front: int, back: int) -> Tensor:
    """x (B, K, S, P) with zero columns around; x itself without any."""
    return F.pad(x, (0, 0, front, back)) if front or back else x
