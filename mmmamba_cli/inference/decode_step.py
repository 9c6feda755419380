"""One token through the whole model, in five ops a layer, over memory that is changed in place.

Nothing here waits for the device, and no shape depends on how far a sequence is: the same launches
serve every token, as a captured graph needs it. Legend: B batch, D hidden size, H query heads,
K key/value heads, P head dim, V vocabulary.

A part of a prompt through one stack: what a step does for a token, for many of them.

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

from mmmamba_cli.inference.packed_model import (
    AttentionPlan,
    HeadNorms,
    LayerPlan,
    Norm,
    Projection,
    ScanPlan,
)
from mmmamba_cli.inference.static_cache import KeysValues, ScanState, StackMemory, States
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.rope import apply_rope, rope_cos_sin
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops import causal_conv, causal_conv_step, rms_norm, ssd, ssd_step
from mmmamba_cli.ops.decode import attention_step, mixer_step
from mmmamba_cli.ops.projection import project


@dataclass(frozen=True)
class Token:
    """What all layers of a stack are told of the token: its column, and its angles (B, P)."""

    column: Tensor
    starts: Tensor
    cos: Tensor | None
    sin: Tensor | None
    backend: str


@torch.no_grad()
def advance(states: States, backend: str = "auto") -> None:
    """Read `states.ids`, leave `states.logits`, and move every counter on by one."""
    plan = states.plan
    hidden = F.embedding(states.ids, plan.text_embedding)
    for stack in states.stacks:
        hidden = _through(stack, hidden, backend)
        if stack.plan is plan.embedding and plan.normalize_embedding_output:
            hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    projected(hidden, plan.head, backend, norm=plan.norm, out=states.logits)
    states.counters.add_(1)


def _through(stack: StackMemory, hidden: Tensor, backend: str) -> Tensor:
    cos = sin = None
    if stack.plan.rotates:
        cos, sin = (x[:, 0] for x in rope_cos_sin(stack.position, stack.inv_freq, hidden.dtype))
    token = Token(stack.column, stack.starts, cos, sin, backend)
    for layer, memory in zip(stack.plan.layers, stack.layers, strict=True):
        hidden = _block(layer, memory, hidden, token)
    return hidden


def _block(
    layer: LayerPlan, memory: KeysValues | ScanState, hidden: Tensor, token: Token
) -> Tensor:
    mixer, backend = layer.mixer, token.backend
    inputs = projected(hidden, mixer.inputs, backend, norm=layer.mixer_norm)
    if isinstance(mixer, ScanPlan):
        assert isinstance(memory, ScanState)
        hidden = _scan(mixer, memory, inputs, hidden, token)
    else:
        assert isinstance(memory, KeysValues)
        y = _attend(mixer, memory, inputs, token)
        hidden = projected(y, mixer.output, backend, residual=hidden)
    inner = projected(hidden, layer.mlp_inputs, backend, norm=layer.mlp_norm, swiglu=True)
    return projected(inner, layer.mlp_output, backend, residual=hidden)


def _scan(
    mixer: ScanPlan, memory: ScanState, inputs: Tensor, hidden: Tensor, token: Token
) -> Tensor:
    """From the packed projection [v|k|q|g|dt] (B, ...) to hidden (B, D) behind W_O.

    States and position are settled since the token before, the gate since the projection.
    """
    width, kv_width = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    vkq, gate, dt = inputs.split((width + 2 * kv_width, width, mixer.heads), dim=-1)
    if memory.ring is not None:
        y = mixer_step(
            vkq,
            dt,
            memory.ring,
            memory.ssm,
            token.column,
            mixer.weights,
            settled=True,
            backend=token.backend,
        )
    else:
        y = _scan_apart(mixer, memory, vkq, dt, token)
    return projected(
        y.flatten(1),
        mixer.output,
        token.backend,
        norm=mixer.gated_norm,
        gate=gate,
        residual=hidden,
        settled=True,
    )


def _scan_apart(
    mixer: ScanPlan, memory: ScanState, vkq: Tensor, dt: Tensor, token: Token
) -> Tensor:
    """The read-out (B, H, P) where q and k are normed or rotated behind the convolution."""
    weights = mixer.weights
    mixed, conv = causal_conv_step(vkq, weights.conv_weight, weights.conv_bias, memory.conv)
    memory.conv.copy_(conv)
    kv_width = mixer.kv_heads * mixer.head_dim
    v, k, q = (
        part.unflatten(-1, (-1, mixer.head_dim))
        for part in mixed.split((kv_width, kv_width, mixer.heads * mixer.head_dim), dim=-1)
    )
    q, k = _normed(mixer.head_norms, q, k)
    if mixer.rope:
        assert token.cos is not None and token.sin is not None
        cos, sin = token.cos.unsqueeze(1), token.sin.unsqueeze(1)
        q, k = (apply_rope(x.unsqueeze(1), cos, sin).squeeze(1) for x in (q, k))
    y, state = ssd_step(
        v,
        dt,
        weights.A,
        k,
        q,
        memory.ssm,
        dt_bias=weights.dt_bias,
        dt_softplus=True,
        D=weights.D,
    )
    memory.ssm.copy_(state)
    return y


def _attend(mixer: AttentionPlan, memory: KeysValues, inputs: Tensor, token: Token) -> Tensor:
    """From the packed projection [q|k|v] (B, ...) to what was attended to, (B, H * P)."""
    width, kv_width = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    q, k, v = (
        part.unflatten(-1, (-1, mixer.head_dim))
        for part in inputs.split((width, kv_width, kv_width), dim=-1)
    )
    q, k = _normed(mixer.head_norms, q, k)
    assert token.cos is not None and token.sin is not None
    return attention_step(
        q,
        k,
        v,
        memory.keys,
        memory.values,
        token.column,
        token.starts,
        token.cos,
        token.sin,
        backend=token.backend,
    )


def _normed(norms: HeadNorms | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if norms is None:
        return q, k
    return rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)


def projected(
    x: Tensor,
    projection: Projection,
    backend: str,
    *,
    norm: Norm | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    out: Tensor | None = None,
    settled: bool = False,
) -> Tensor:
    """`ops.project`; a sum with `residual` takes its place."""
    return project(
        x,
        projection.weight,
        bias=projection.bias,
        norm=None if norm is None else norm.weight,
        norm_dim=None if norm is None or norm.weight is not None else norm.dim,
        eps=0.0 if norm is None else norm.eps,
        gate=gate,
        residual=residual,
        swiglu=swiglu,
        out=residual if out is None else out,
        settled=settled,
        backend=backend,
    )


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
    columns: Sequence[SequenceLayout | None],
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
    columns: SequenceLayout | None,
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
            rows = _scan_chunk(layer.mixer, memory, inputs, rows, len(hidden), mask, padding)
        else:
            assert columns is not None, "a module is asked"
            normed = block.mixer_norm(rows.view_as(hidden))
            rows += block.mixer(normed, columns, cache).view_as(rows)
        inner = projected(rows, layer.mlp_inputs, BACKEND, norm=layer.mlp_norm, swiglu=True)
        rows = projected(inner, layer.mlp_output, BACKEND, residual=rows)
    return rows.view_as(hidden)


def _scan_chunk(
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
