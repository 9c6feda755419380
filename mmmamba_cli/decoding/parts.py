"""A part of a prompt through one stack: what a step does for a token, for many of them.

Mixers that one op steps are read from the packed weights, in place; attention, and mixers with a
norm or rotation of their own, by the model's modules. Legend: B batch, T columns of the part,
D hidden size, H query heads, K key/value heads, P head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.decoding.plan import ScanPlan
from mmmamba_cli.decoding.states import ScanState, StackMemory, States
from mmmamba_cli.decoding.stepping import projected
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.sequence import Columns
from mmmamba_cli.ops import causal_conv, ssd

BACKEND = "auto"


@dataclass(frozen=True)
class Padding:
    """Columns of a part that leave no trace, (B or 1, T, 1) bool: all in front of the real ones, or
    all behind the first `length` (1,) int64."""

    columns: Tensor
    length: Tensor | None = None


def embedded(states: States, inputs: Tensor) -> Tensor:
    """What the first layer sees, (B, T, D), of that or of ids (B, T)."""
    return inputs if inputs.dim() == 3 else F.embedding(inputs, states.plan.text_embedding)


def read_stacks(
    states: States,
    blocks: Sequence[Block],
    hidden: Tensor,
    columns: Sequence[Columns | None],
    cache: Any,
    padding: Padding | None,
) -> Tensor:
    """`hidden` (B, T, D) behind all stacks, each of which sees the same columns of the prompt."""
    plan, first = states.plan, 0
    for stack, seen in zip(states.stacks, columns, strict=True):
        own = blocks[first : first + len(stack.layers)]
        first += len(own)
        hidden = read_part(stack, own, hidden, seen, cache, padding)
        if stack.plan is plan.embedding and plan.normalize_embedding_output:
            hidden = hidden / hidden.norm(dim=-1, keepdim=True)
            if padding is not None:
                # Where nothing but zeros came that is 0 / 0, and attention multiplies it by zero.
                hidden = hidden.masked_fill(padding.columns, 0)
    return hidden


def read_part(
    stack: StackMemory,
    blocks: Sequence[Block],
    hidden: Tensor,
    columns: Columns | None,
    cache: Any,
    padding: Padding | None = None,
) -> Tensor:
    """`hidden` (B, T, D), which may be overwritten, behind all layers; their memory moves on.

    `cache` is that memory as the modules know it; it and `columns` may be None where no module is
    asked. `padding` is where `columns` have no mask, and is not hidden from modules.
    """
    mask = None if columns is None else columns.mask
    rows = hidden.reshape(-1, hidden.shape[-1])
    for layer, memory, block in zip(stack.plan.layers, stack.layers, blocks, strict=True):
        if isinstance(layer.mixer, ScanPlan) and layer.mixer.is_plain:
            assert isinstance(memory, ScanState)
            inputs = projected(rows, layer.mixer.inputs, BACKEND, norm=layer.mixer_norm)
            rows = _scan(layer.mixer, memory, inputs, rows, len(hidden), mask, padding)
        else:
            assert columns is not None, "a module is asked"
            normed = block.mixer_norm(rows.view_as(hidden))
            rows += block.mixer(normed, columns, cache).view_as(rows)
        inner = projected(rows, layer.mlp_inputs, BACKEND, norm=layer.mlp_norm, swiglu=True)
        rows = projected(inner, layer.mlp_output, BACKEND, residual=rows)
    return rows.view_as(hidden)


def _scan(
    mixer: ScanPlan,
    memory: ScanState,
    inputs: Tensor,
    rows: Tensor,
    batch: int,
    mask: Tensor | None,
    padding: Padding | None,
) -> Tensor:
    """From [v|k|q|g|dt] (B * T, ...) to the rows (B * T, D) behind W_O and its residual."""
    width, kv_width = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    vkq, gate, dt = inputs.split((width + 2 * kv_width, width, mixer.heads), dim=-1)
    weights = mixer.weights
    if padding is not None:
        # As if nothing had come: a convolution begins with zeros, and the step of -inf is 0.
        inputs.unflatten(0, (batch, -1)).masked_fill_(padding.columns, 0)
        dt.unflatten(0, (batch, -1)).masked_fill_(padding.columns, -math.inf)
    # Memory that nothing was read into yet is zero, which is how both begin.
    vkq = vkq.unflatten(0, (batch, -1))
    mixed, conv = causal_conv(
        vkq,
        weights.conv_weight,
        weights.conv_bias,
        initial_state=memory.conv,
        mask=mask,
    )
    v, k, q = (
        part.unflatten(-1, (-1, mixer.head_dim))
        for part in mixed.split((kv_width, kv_width, width), dim=-1)
    )
    y, ssm = ssd(
        v,
        dt.unflatten(0, (batch, -1)),
        weights.A,
        k,
        q,
        dt_bias=weights.dt_bias,
        dt_softplus=True,
        D=weights.D,
        initial_state=memory.ssm,
        mask=mask,
    )
    if padding is not None and padding.length is not None:
        conv = _last_of(vkq, padding.length, conv.shape[-1])
    memory.conv.copy_(conv)
    memory.ssm.copy_(ssm)
    return projected(
        y.reshape(len(rows), width),
        mixer.output,
        BACKEND,
        norm=mixer.gated_norm,
        gate=gate,
        residual=rows,
    )


def _last_of(inputs: Tensor, length: Tensor, count: int) -> Tensor:
    """The last `count` of the first `length` (1,) columns of (B, T, Ch), as (B, Ch, count).

    Zeros where there are fewer. Asks the device nothing.
    """
    places = length - count + torch.arange(count, device=length.device)
    found = inputs.index_select(1, places.clamp(min=0))
    return found.masked_fill((places < 0).view(1, -1, 1), 0).transpose(1, 2)
