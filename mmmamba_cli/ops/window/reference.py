"""Sliding-window attention by a dense masked softmax, and one decoding step.

Legend: B batch, T columns, S keys with those of the past, H query heads, K key/value heads, P head
dim, F first tokens (`sinks`), W window.

Scores, softmax and its product with the values are fp32, or fp64 if q is fp64; autocast is disabled
for them. A decoding step computes in the dtype of q.
"""

import math

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import segment_ordinals, upcast, without_autocast
from mmmamba_cli.ops.window.inputs import WindowInputs
from mmmamba_cli.ops.window.masked_attention import masked_attention, softmax_with_sink
from mmmamba_cli.ops.window.state import WindowState, slot_ordinals, slots_in_use


def dense(inputs: WindowInputs) -> Tensor:
    """Compute all T x S scores in fp32, or in fp64 if q is fp64."""
    past, k, v = inputs.past, _without_padding(inputs.k, inputs), _without_padding(inputs.v, inputs)
    if past is not None:
        k = torch.cat((past.keys.to(k.dtype), k), dim=2)
        v = torch.cat((past.values.to(v.dtype), v), dim=2)
    v = upcast(v).repeat_interleave(inputs.q.shape[1] // v.shape[1], dim=1)
    with without_autocast(v):
        return (_softmax(inputs, k) @ v).to(inputs.q.dtype)


def matrix(inputs: WindowInputs) -> Tensor:
    """The softmax over the keys of this call, (B, H, T, T) in fp32 or fp64."""
    return _softmax(inputs, _without_padding(inputs.k, inputs))


def _without_padding(x: Tensor, inputs: WindowInputs) -> Tensor:
    """x (B, K, T, P) with 0 at padding."""
    return x if inputs.mask is None else x.masked_fill(~inputs.mask.bool()[:, None, :, None], 0)


def _softmax(inputs: WindowInputs, keys: Tensor) -> Tensor:
    """The softmax (B, H, T, S) in fp32 or fp64, 0 in rows of padding and at keys that are not seen.

    `keys` (B, K, S, P) are those of `inputs.past`, if given, then those of this call, all finite.
    """
    seen = _visible_keys(inputs)
    queries = seen.any(-1)
    # A query of padding reads all keys until its row is cleared: softmax over none is NaN.
    seen = seen | ~queries.unsqueeze(-1)
    padding = ~queries[:, None, :, None]
    q = upcast(inputs.q).masked_fill(padding, 0)
    keys = upcast(keys).repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    with without_autocast(q):
        scores = q @ keys.mT / math.sqrt(q.shape[-1])
    return softmax_with_sink(scores, seen, inputs.sink_logits).masked_fill(padding, 0)


def _visible_keys(inputs: WindowInputs) -> Tensor:
    """(B, T, S) bool, True where a real query sees a key of the past or of this call."""
    (batch, _, length, _), device = inputs.q.shape, inputs.q.device
    real = torch.ones(batch, length, dtype=torch.bool, device=device)
    if inputs.mask is not None:
        real = inputs.mask.bool()
    sequence = torch.zeros(batch, length, dtype=torch.long, device=device)
    if inputs.seq_idx is not None:
        sequence = segment_ordinals(inputs.seq_idx, inputs.mask)
    same = sequence[:, :, None] == sequence[:, None, :]
    ordinals = (same & real[:, None, :]).tril(-1).sum(-1)
    key_ordinals, key_sequence, key_real = ordinals, sequence, real
    if inputs.past is not None:
        counts = inputs.past.counts
        ordinals = ordinals + counts[:, None] * (sequence == 0)
        slots = slot_ordinals(counts, inputs.window, inputs.sinks)
        key_ordinals = torch.cat((slots, ordinals), dim=1)
        key_sequence = torch.cat((torch.zeros_like(slots), sequence), dim=1)
        key_real = torch.cat((slots_in_use(slots, inputs.sinks), real), dim=1)
    i, j = ordinals[:, :, None], key_ordinals[:, None, :]
    near = (i - j < inputs.window) | (j < inputs.sinks)
    in_sequence = sequence[:, :, None] == key_sequence[:, None, :]
    return (j <= i) & near & in_sequence & real[:, :, None] & key_real[:, None, :]


def step(
    q: Tensor, k: Tensor, v: Tensor, state: WindowState, sinks: int, sink_logits: Tensor | None
) -> Tensor:
    """Shapes as in `ops.window_step`; `state.keys` and `state.values` are updated in place."""
    keys, values, counts = state
    window = keys.shape[2] - sinks
    slots = [sinks + counts % window]
    if sinks > 0:
        # One of the first tokens goes to its own slot too; others are written to the ring again.
        slots.append(torch.where(counts < sinks, counts, slots[0]))
    for slot in slots:
        index = slot.long()[:, None, None, None].expand(-1, keys.shape[1], 1, keys.shape[3])
        keys.scatter_(2, index, k.unsqueeze(2).to(keys.dtype))
        values.scatter_(2, index, v.unsqueeze(2).to(values.dtype))
    seen = slots_in_use(slot_ordinals(counts + 1, window, sinks), sinks)
    y = masked_attention(
        q.unsqueeze(2), keys.to(q.dtype), values.to(q.dtype), seen.unsqueeze(1), sink_logits
    )
    return y.flatten(1)
