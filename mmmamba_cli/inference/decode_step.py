"""Forward passes over the packed weights: one token (decoding), or one chunk of a prompt (prefill).

A decoding step never synchronizes and its shapes are static, so it can be captured as a CUDA graph;
it is five ops per layer. Caches are updated in place. Legend: B batch, T columns of a chunk,
D hidden size, H query heads, K key/value heads, P head dim, Ch channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.inference.packed_model import PackedAttention, PackedLayer, PackedMamba2, QKNorm
from mmmamba_cli.inference.sampling import Sampler, SamplingMode
from mmmamba_cli.inference.static_cache import KVCache, Mamba2Cache, StackCache, StaticCache
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.rope import apply_rope, rope_cos_sin
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops import causal_conv, causal_conv_step, rms_norm, ssd, ssd_step
from mmmamba_cli.ops.decode import attention_step, mixer_step
from mmmamba_cli.ops.projection import project


@dataclass(frozen=True)
class TokenInfo:
    """Inputs of a step that all layers of a stack share.

    Attributes:
        column: (1,) int64, the token's column in the cache.
        starts: (B,) int64, the first column of each row that is not padding.
        cos, sin: (B, P), the token's RoPE rotation; None for stacks without RoPE.
        backend: backend of the ops.
    """

    column: Tensor
    starts: Tensor
    cos: Tensor | None
    sin: Tensor | None
    backend: str


@torch.no_grad()
def decode_step(
    cache: StaticCache,
    backend: str = "auto",
    sampler: Sampler | None = None,
    mode: SamplingMode | None = None,
) -> None:
    """Read the tokens `cache.ids`, write `cache.logits` and advance the cache by one column.

    With a `mode`, also write the sampled next tokens into `cache.ids`.
    """
    packed = cache.packed
    hidden = F.embedding(cache.ids, packed.text_embedding)
    for stack in cache.stacks:
        cos = sin = None
        if stack.packed.uses_rope:
            cos, sin = (x[:, 0] for x in rope_cos_sin(stack.position, stack.inv_freq, hidden.dtype))
        token = TokenInfo(stack.column, stack.starts, cos, sin, backend)
        for layer, layer_cache in zip(stack.packed.layers, stack.layers, strict=True):
            hidden = _layer_step(layer, layer_cache, hidden, token)
        if stack.packed is packed.embedding and packed.normalize_embedding_output:
            hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    head = packed.head
    project(hidden, head.weight, **head.options, out=cache.logits, backend=backend)
    cache.counters.add_(1)
    if sampler is not None and mode is not None:
        sampler.sample(cache, mode)


def _layer_step(
    layer: PackedLayer, cache: KVCache | Mamba2Cache, hidden: Tensor, token: TokenInfo
) -> Tensor:
    """`hidden` (B, D) after one layer; residual sums are written in place."""
    mixer, backend = layer.mixer, token.backend
    inputs = project(hidden, mixer.inputs.weight, **mixer.inputs.options, backend=backend)
    if isinstance(mixer, PackedMamba2):
        assert isinstance(cache, Mamba2Cache)
        hidden = _mamba2_step(mixer, cache, inputs, hidden, token)
    else:
        assert isinstance(cache, KVCache)
        hidden = _attention_step(mixer, cache, inputs, hidden, token)
    up, down = layer.mlp_inputs, layer.mlp_output
    inner = project(hidden, up.weight, **up.options, swiglu=True, backend=backend)
    return project(inner, down.weight, **down.options, residual=hidden, out=hidden, backend=backend)


def _mamba2_step(
    mixer: PackedMamba2, cache: Mamba2Cache, inputs: Tensor, hidden: Tensor, token: TokenInfo
) -> Tensor:
    """From the packed projection [v|k|q|g|dt] (B, ...) to hidden (B, D) after W_O."""
    width, kv_width = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    vkq, gate, dt = inputs.split((width + 2 * kv_width, width, mixer.heads), dim=-1)
    if cache.ring is None:
        y = _unfused_mamba2_step(mixer, cache, vkq, dt, token)
    else:
        # States and position were written by the previous token's launches.
        y = mixer_step(
            vkq,
            dt,
            cache.ring,
            cache.ssm,
            token.column,
            mixer.weights,
            inputs_ready=True,
            backend=token.backend,
        )
    return project(
        y.flatten(1),
        mixer.output.weight,
        **mixer.output.options,
        gate=gate,
        residual=hidden,
        out=hidden,
        # The gate was written by the input projection, before the mixer's launch.
        inputs_ready=True,
        backend=token.backend,
    )


def _unfused_mamba2_step(
    mixer: PackedMamba2, cache: Mamba2Cache, vkq: Tensor, dt: Tensor, token: TokenInfo
) -> Tensor:
    """The scan's output (B, H, P) for a mixer with a norm or RoPE on q and k."""
    weights = mixer.weights
    mixed, conv = causal_conv_step(vkq, weights.conv_weight, weights.conv_bias, cache.conv)
    cache.conv.copy_(conv)
    kv_width = mixer.kv_heads * mixer.head_dim
    v, k, q = (
        part.unflatten(-1, (-1, mixer.head_dim))
        for part in mixed.split((kv_width, kv_width, mixer.heads * mixer.head_dim), dim=-1)
    )
    q, k = _normalize_qk(mixer.qk_norm, q, k)
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
        cache.ssm,
        dt_bias=weights.dt_bias,
        dt_softplus=True,
        D=weights.D,
    )
    cache.ssm.copy_(state)
    return y


def _attention_step(
    mixer: PackedAttention, cache: KVCache, inputs: Tensor, hidden: Tensor, token: TokenInfo
) -> Tensor:
    """From the packed projection [q|k|v] (B, ...) to hidden (B, D) after W_O."""
    width, kv_width = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    q, k, v = (
        part.unflatten(-1, (-1, mixer.head_dim))
        for part in inputs.split((width, kv_width, kv_width), dim=-1)
    )
    q, k = _normalize_qk(mixer.qk_norm, q, k)
    assert token.cos is not None and token.sin is not None
    y = attention_step(
        q,
        k,
        v,
        cache.keys,
        cache.values,
        token.column,
        token.starts,
        token.cos,
        token.sin,
        backend=token.backend,
    )
    return project(
        y,
        mixer.output.weight,
        **mixer.output.options,
        residual=hidden,
        out=hidden,
        backend=token.backend,
    )


def _normalize_qk(norm: QKNorm | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if norm is None:
        return q, k
    return rms_norm(q, norm.q, norm.eps), rms_norm(k, norm.k, norm.eps)


@dataclass(frozen=True)
class ChunkPadding:
    """Padding mask of a chunk: left padding, or right padding after `length` columns.

    `columns` is (B or 1, T, 1) bool, True for padding; `length` is (1,) int64.
    """

    columns: Tensor
    length: Tensor | None = None


def embed(cache: StaticCache, inputs: Tensor) -> Tensor:
    """Input of the first layer (B, T, D); `inputs` are ids (B, T), or embedded already."""
    return inputs if inputs.dim() == 3 else F.embedding(inputs, cache.packed.text_embedding)


def prefill_stacks(
    cache: StaticCache,
    blocks: Sequence[Block],
    hidden: Tensor,
    columns: Sequence[SequenceLayout | None],
    module_cache: Any,
    padding: ChunkPadding | None,
) -> Tensor:
    """`hidden` (B, T, D) after all stacks, each of which sees the same columns of the prompt."""
    packed, first = cache.packed, 0
    for stack, stack_columns in zip(cache.stacks, columns, strict=True):
        stack_blocks = blocks[first : first + len(stack.layers)]
        first += len(stack_blocks)
        hidden = prefill_chunk(stack, stack_blocks, hidden, stack_columns, module_cache, padding)
        if stack.packed is packed.embedding and packed.normalize_embedding_output:
            hidden = hidden / hidden.norm(dim=-1, keepdim=True)
            if padding is not None:
                # Padding may be 0 / 0 here, and NaN would spread through attention: 0 * NaN.
                hidden = hidden.masked_fill(padding.columns, 0)
    return hidden


def prefill_chunk(
    stack: StackCache,
    blocks: Sequence[Block],
    hidden: Tensor,
    columns: SequenceLayout | None,
    module_cache: Any,
    padding: ChunkPadding | None = None,
) -> Tensor:
    """Run a chunk through all layers of a stack and advance their caches.

    Mamba-2 mixers with a fused step run on the packed weights, all other mixers by the model's
    modules.

    Args:
        stack: caches of the stack.
        blocks: the model's blocks of the stack.
        hidden: (B, T, D); may be overwritten.
        columns: positions and mask of the chunk; None if no module runs.
        module_cache: the same caches with the interface of the modules; None if no module runs.
        padding: padding that `columns` does not mask. Modules ignore it.

    Returns:
        (B, T, D) after the last layer.
    """
    mask = None if columns is None else columns.mask
    rows = hidden.reshape(-1, hidden.shape[-1])
    for layer, layer_cache, block in zip(stack.packed.layers, stack.layers, blocks, strict=True):
        if isinstance(layer.mixer, PackedMamba2) and layer.mixer.has_fused_step:
            assert isinstance(layer_cache, Mamba2Cache)
            rows = _mamba2_chunk(layer.mixer, layer_cache, rows, len(hidden), mask, padding)
        else:
            assert columns is not None, "modules need positions"
            normed = block.mixer_norm(rows.view_as(hidden))
            rows += block.mixer(normed, columns, module_cache).view_as(rows)
        up, down = layer.mlp_inputs, layer.mlp_output
        inner = project(rows, up.weight, **up.options, swiglu=True)
        rows = project(inner, down.weight, **down.options, residual=rows, out=rows)
    return rows.view_as(hidden)


def _mamba2_chunk(
    mixer: PackedMamba2,
    cache: Mamba2Cache,
    rows: Tensor,
    batch: int,
    mask: Tensor | None,
    padding: ChunkPadding | None,
) -> Tensor:
    """Rows (B * T, D) after the mixer and its residual sum, which is written in place."""
    inputs = project(rows, mixer.inputs.weight, **mixer.inputs.options)
    width, kv_width = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    vkq, gate, dt = inputs.split((width + 2 * kv_width, width, mixer.heads), dim=-1)
    weights = mixer.weights
    if padding is not None:
        # Zero inputs leave the convolution unchanged; softplus(-inf) = 0 leaves the SSM state.
        inputs.unflatten(0, (batch, -1)).masked_fill_(padding.columns, 0)
        dt.unflatten(0, (batch, -1)).masked_fill_(padding.columns, -math.inf)
    vkq = vkq.unflatten(0, (batch, -1))
    mixed, conv = causal_conv(
        vkq,
        weights.conv_weight,
        weights.conv_bias,
        initial_state=cache.conv,
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
        initial_state=cache.ssm,
        mask=mask,
    )
    if padding is not None and padding.length is not None:
        conv = _last_columns(vkq, padding.length, conv.shape[-1])
    cache.conv.copy_(conv)
    cache.ssm.copy_(ssm)
    return project(
        y.reshape(len(rows), width),
        mixer.output.weight,
        **mixer.output.options,
        gate=gate,
        residual=rows,
        out=rows,
    )


def _last_columns(inputs: Tensor, length: Tensor, count: int) -> Tensor:
    """The last `count` of the first `length` (1,) columns of (B, T, Ch), as (B, Ch, count).

    Zeros where there are fewer. Does not synchronize.
    """
    indices = length - count + torch.arange(count, device=length.device)
    found = inputs.index_select(1, indices.clamp(min=0))
    return found.masked_fill((indices < 0).view(1, -1, 1), 0).transpose(1, 2)
