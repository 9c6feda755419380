"""KV cache and SSM states at fixed addresses, so that captured CUDA graphs find them.

Legend: B batch, K key/value heads, H query heads, P head dim, S capacity in columns, T columns of a
chunk, Ch channels of the convolution, W its width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.architecture import kv_cache_bytes
from mmmamba_cli.inference.packed_mixer import LayerCache
from mmmamba_cli.inference.packed_model import PackedModel, PackedStack
from mmmamba_cli.model.cache import DecodingState
from mmmamba_cli.model.rope import inverse_frequencies
from mmmamba_cli.model.sequence_layout import StackState

# `fill_random` draws this many columns and repeats them: drawing whole caches takes too long.
RANDOM_COLUMNS = 1024
# Rows of logits start at multiples of this many elements, so that GEMMs can write them aligned.
PAD_LOGITS_TO = 16


class StackCache:
    """Layer caches and position of one stack.

    Attributes:
        capacity: S; 0 for a stack without attention.
        column: (1,) int64, the next token's column in the cache.
        position: (B, 1) int64, the next token's position for RoPE.
        starts: (B,) int64, the first column of each row that is not padding.
        inv_freq: (B, 1, P / 2), RoPE frequencies, fixed by the prompt.
    """

    def __init__(self, packed: PackedStack, like: Tensor, counters: Tensor, capacity: int):
        batch = counters.shape[0] - 1
        self.packed = packed
        self.capacity = capacity if packed.has_attention else 0
        self.layers: list[LayerCache] = [
            layer.mixer.empty_cache(like, batch, capacity) for layer in packed.layers
        ]
        self.column = counters[:1]
        self.position = counters[1:].view(batch, 1)
        self.starts = torch.zeros_like(counters[1:])
        half = packed.config.head_dim // 2
        self.inv_freq = torch.zeros(batch, 1, half, device=like.device)

    def finish_prefill(self, state: StackState) -> None:
        """Copy positions and frequencies from `state`, and fill the ring buffers."""
        self.column.fill_(state.length)
        self.position.fill_(state.length)
        if state.next_position is not None:
            self.position.copy_(state.next_position)
        self.starts.zero_()
        if state.mask is not None:
            self.starts.copy_(state.mask.logical_not().sum(1))
        assert state.inv_freq is not None, "prefill describes the stack"
        self.inv_freq.copy_(state.inv_freq)
        for layer in self.layers:
            layer.finish_prefill(state.length)


class StaticCache:
    """All decoding state of one batch of sequences.

    `ids` (B,) is the input of the next step and `logits` (B, V) its output; `finished` (B,) bool
    marks rows that have ended.
    """

    def __init__(self, packed: PackedModel, batch: int, capacities: tuple[int, ...]):
        """`capacities`: S of each stack."""
        like = packed.text_embedding
        self.packed = packed
        self.batch = batch
        # One tensor, so that one kernel launch advances all counters.
        self.counters = torch.zeros(
            len(capacities), 1 + batch, dtype=torch.int64, device=like.device
        )
        self.stacks = [
            StackCache(stack, like, counters, capacity)
            for stack, counters, capacity in zip(
                packed.stacks, self.counters, capacities, strict=True
            )
        ]
        self.ids = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=like.device)
        width = -(-like.shape[0] // PAD_LOGITS_TO) * PAD_LOGITS_TO
        self.logits = like.new_zeros(batch, width)[:, : like.shape[0]]

    @property
    def nbytes(self) -> int:
        """Bytes of KV caches, convolution states and SSM states."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of all layer caches."""
        layers = (layer for stack in self.stacks for layer in stack.layers)
        return [tensor for layer in layers for tensor in layer.tensors]

    def clear(self) -> None:
        """Reset to the state before the first token."""
        self.counters.zero_()
        self.ids.zero_()
        self.finished.zero_()
        for tensor in self.tensors:
            tensor.zero_()

    def finish_prefill(self, state: DecodingState) -> None:
        """Prepare every stack for decoding after a prompt that ended in `state`."""
        states = (state.embedding, state.language)[-len(self.stacks) :]
        for stack, stack_state in zip(self.stacks, states, strict=True):
            stack.finish_prefill(stack_state)

    def copy_from(self, other: StaticCache) -> None:
        """Copy the state of `other`, which has the same batch size and no larger capacity."""
        for own, theirs in zip(self._buffers, other._buffers, strict=True):
            own.copy_(theirs)
        for own, theirs in zip(self.tensors, other.tensors, strict=True):
            # Only keys and values may be shorter in `other`, along their third dimension.
            own[:, :, : theirs.shape[2]].copy_(theirs)

    @property
    def _buffers(self) -> list[Tensor]:
        """All tensors beside the layer caches."""
        found = [self.counters, self.ids, self.finished, self.logits]
        return found + [x for stack in self.stacks for x in (stack.starts, stack.inv_freq)]

    def fill_random(self, columns: int, rng: torch.Generator) -> None:
        """Fill with random contents, as if after a prompt of `columns` columns; for benchmarks.

        `rng` is a generator of the cache's device.
        """
        for tensor in self.tensors:
            _randomize(tensor, rng)
        self.set_length(columns)

    def set_length(self, columns: int) -> None:
        """Set all positions as after an unpadded prompt of `columns` columns in every row."""
        state = DecodingState()
        states = (state.embedding, state.language)[-len(self.stacks) :]
        for stack, stack_state in zip(self.stacks, states, strict=True):
            stack_state.length = columns
            stack_state.inv_freq = inverse_frequencies(
                stack.packed.config, columns, self.ids.device
            )
        self.finish_prefill(state)


def kv_nbytes(packed: PackedModel, batch: int, capacities: tuple[int, ...]) -> int:
    """Bytes of all keys and values of a `StaticCache`; the rest is small beside them."""
    size = packed.text_embedding.element_size()
    return sum(
        kv_cache_bytes(stack.config, batch, capacity, size)
        for stack, capacity in zip(packed.stacks, capacities, strict=True)
        for layer in stack.layers
        if layer.mixer.grows
    )


def _randomize(tensor: Tensor, rng: torch.Generator) -> None:
    """Fill with normal numbers, repeated along the third dimension where it is long."""
    shape = list(tensor.shape)
    shape[2] = min(shape[2], RANDOM_COLUMNS)
    block = torch.randn(shape, generator=rng, device=tensor.device).to(tensor)
    for start in range(0, tensor.shape[2], RANDOM_COLUMNS):
        part = tensor[:, :, start : start + RANDOM_COLUMNS]
        part.copy_(block[:, :, : part.shape[2]])


class PrefillCache:
    """Minimal transformers-cache interface backed by a `StaticCache`, for the model's modules."""

    def __init__(self, cache: StaticCache):
        self.decoding_state = DecodingState()
        self.layers = [layer.module_layer() for stack in cache.stacks for layer in stack.layers]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        found: tuple[Tensor, Tensor] = layer.update(keys, values)
        return found

    def update_conv_state(self, state: Tensor, layer_idx: int) -> None:
        layer: Any = self.layers[layer_idx]
        layer.conv_states[0].copy_(state)

    def update_recurrent_state(self, state: Tensor, layer_idx: int) -> None:
        layer: Any = self.layers[layer_idx]
        layer.recurrent_states[0].copy_(state)
        layer.has_previous_state[0] = True
