"""A part of a prompt through one stack: what a step does for a token, for many of them.

Mixers that one op steps are read from the packed weights, in place; attention, and mixers with a
norm or rotation of their own, by the model's modules. Legend: B batch, T columns of the part,
D hidden size, H query heads, K key/value heads, P head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmmamba_cli.decoding.plan import ScanPlan
from mmmamba_cli.decoding.states import ScanState, StackMemory
from mmmamba_cli.decoding.stepping import projected
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.sequence import Columns
from mmmamba_cli.ops import causal_conv, ssd

BACKEND = "auto"


def read_part(
    stack: StackMemory,
    blocks: Sequence[Block],
    hidden: Tensor,
    columns: Columns | None,
    cache: Any,
    padding: Tensor | None = None,
) -> Tensor:
    """`hidden` (B, T, D), which may be overwritten, behind all layers; their memory moves on.

    `cache` is that memory as the modules know it; it and `columns` may be None where no module is
    asked. `padding` (B, T, 1) bool then says what leaves no trace, in front of every real token.
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
    padding: Tensor | None,
) -> Tensor:
    """From [v|k|q|g|dt] (B * T, ...) to the rows (B * T, D) behind W_O and its residual."""
    width, kv_width = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    vkq, gate, dt = inputs.split((width + 2 * kv_width, width, mixer.heads), dim=-1)
    weights = mixer.weights
    if padding is not None:
        # As if nothing had come: a convolution begins with zeros, and the step of -inf is 0.
        inputs.unflatten(0, (batch, -1)).masked_fill_(padding, 0)
        dt.unflatten(0, (batch, -1)).masked_fill_(padding, -math.inf)
    # Memory that nothing was read into yet is zero, which is how both begin.
    mixed, conv = causal_conv(
        vkq.unflatten(0, (batch, -1)),
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
