"""One token through the whole model, in five ops a layer, over memory that is changed in place.

Nothing here waits for the device, and no shape depends on how far a sequence is: the same launches
serve every token, as a captured graph needs it. Legend: B batch, D hidden size, H query heads,
K key/value heads, P head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.decoding.plan import (
    AttentionPlan,
    HeadNorms,
    LayerPlan,
    Norm,
    Projection,
    ScanPlan,
)
from mmmamba_cli.decoding.states import KeysValues, ScanState, StackMemory, States
from mmmamba_cli.model.rope import rotate, rotation
from mmmamba_cli.ops import causal_conv_step, rms_norm, ssd_step
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
        cos, sin = (x[:, 0] for x in rotation(stack.position, stack.inv_freq, hidden.dtype))
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
        q, k = (rotate(x.unsqueeze(1), cos, sin).squeeze(1) for x in (q, k))
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
