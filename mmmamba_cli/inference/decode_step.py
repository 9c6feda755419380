"""Forward passes over the packed weights: one token (decoding), or one chunk of a prompt (prefill).

A decoding step never synchronizes and its shapes are static, so it can be captured as a CUDA graph;
it is five ops per layer. Caches are updated in place. Legend: B batch, T columns of a chunk,
D hidden size, H query heads, K key/value heads, P head dim, Ch channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.inference.packed_mixer import ChunkPadding, LayerCache, TokenInfo
from mmmamba_cli.inference.packed_model import PackedLayer
from mmmamba_cli.inference.sampling import Sampler, SamplingMode
from mmmamba_cli.inference.static_cache import StackCache, StaticCache
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.rope import rope_cos_sin
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops.projection import project


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


def _layer_step(layer: PackedLayer, cache: LayerCache, hidden: Tensor, token: TokenInfo) -> Tensor:
    """`hidden` (B, D) after one layer; residual sums are written in place."""
    mixer, backend = layer.mixer, token.backend
    inputs = project(hidden, mixer.inputs.weight, **mixer.inputs.options, backend=backend)
    hidden = mixer.step(cache, inputs, hidden, token)
    up, down = layer.mlp_inputs, layer.mlp_output
    inner = project(hidden, up.weight, **up.options, swiglu=True, backend=backend)
    return project(inner, down.weight, **down.options, residual=hidden, out=hidden, backend=backend)


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

    Mixers that can (`PackedMixer.chunks`) run on the packed weights, all others by the model's
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
        if layer.mixer.chunks:
            rows = layer.mixer.chunk(layer_cache, rows, len(hidden), mask, padding)
        else:
            assert columns is not None, "modules need positions"
            normed = block.mixer_norm(rows.view_as(hidden))
            rows += block.mixer(normed, columns, module_cache).view_as(rows)
        up, down = layer.mlp_inputs, layer.mlp_output
        inner = project(rows, up.weight, **up.options, swiglu=True)
        rows = project(inner, down.weight, **down.options, residual=rows, out=rows)
    return rows.view_as(hidden)
