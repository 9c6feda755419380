"""What decoding remembers, in memory that never moves: a captured graph finds it again.

Legend: B batch, K key/value heads, H query heads, P head dim, S room in columns, Ch channels of the
convolution, W its width, V vocabulary.

Memory of ours as a model's modules know it, while they read a prompt into it.

Legend: B batch, K key/value heads, T columns, P head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.architecture import kv_cache_bytes
from mmmamba_cli.inference.packed_model import AttentionPlan, LayerPlan, ModelPlan, StackPlan
from mmmamba_cli.model.cache import DecodingState
from mmmamba_cli.model.rope import inverse_frequencies
from mmmamba_cli.model.sequence_layout import StackState
from mmmamba_cli.ops.backends import compute_dtype
from mmmamba_cli.ops.decode import ring_of

# Random contents are drawn once and repeated: it is their size that takes time.
BLOCK = 1024
ALIGNED_TO = 16


@dataclass(frozen=True)
class KeysValues:
    """Of an attention layer, (B, K, S, P) each."""

    keys: Tensor
    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values)


@dataclass(frozen=True)
class ScanState:
    """Of a Mamba-2 layer: the convolution's last inputs, and the state (B, H, P, P) in fp32.

    `conv` (B, Ch, W - 1) holds them oldest first, as prefill leaves them. A mixer that one op steps
    has them in `ring` (B, Ch, W) while decoding: there, column t lies in slot t % W.
    """

    conv: Tensor
    ring: Tensor | None
    ssm: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.conv, self.ssm) if self.ring is None else (self.conv, self.ring, self.ssm)


class StackMemory:
    """Of one stack: its layers' memory, and where it is.

    `column` (1,) and `position` (B, 1), int64, are those of the next token, in the cache and for
    RoPE; `starts` (B,) is the first column of each row that is not padding, `inv_freq` (B, 1, P/2)
    what the prompt fixed. `room` is S, 0 where nothing grows.
    """

    def __init__(self, plan: StackPlan, like: Tensor, counters: Tensor, room: int):
        batch = counters.shape[0] - 1
        self.plan = plan
        self.room = room if plan.grows else 0
        self.layers = [_empty_layer(layer, like, batch, room) for layer in plan.layers]
        self.column = counters[:1]
        self.position = counters[1:].view(batch, 1)
        self.starts = torch.zeros_like(counters[1:])
        half = plan.config.head_dim // 2
        self.inv_freq = torch.zeros(batch, 1, half, device=like.device)

    def settle(self, seen: StackState) -> None:
        """Take over what prefill left, and lay the convolutions' inputs into their rings."""
        self.column.fill_(seen.length)
        self.position.fill_(seen.length)
        if seen.next_position is not None:
            self.position.copy_(seen.next_position)
        self.starts.zero_()
        if seen.mask is not None:
            self.starts.copy_(seen.mask.logical_not().sum(1))
        assert seen.inv_freq is not None, "prefill describes the stack"
        self.inv_freq.copy_(seen.inv_freq)
        for layer in self.layers:
            if isinstance(layer, ScanState) and layer.ring is not None:
                layer.ring.copy_(ring_of(layer.conv, seen.length))


class States:
    """The memory of one batch of sequences.

    `ids` (B,) is what the next step reads, `logits` (B, V) what it leaves; `finished` (B,) marks
    rows that have ended, for whoever chooses tokens.
    """

    def __init__(self, plan: ModelPlan, batch: int, rooms: tuple[int, ...]):
        """`rooms`: S of each stack."""
        like = plan.text_embedding
        self.plan = plan
        self.batch = batch
        # One tensor, so that one launch advances all of it.
        self.counters = torch.zeros(len(rooms), 1 + batch, dtype=torch.int64, device=like.device)
        self.stacks = [
            StackMemory(stack, like, counters, room)
            for stack, counters, room in zip(plan.stacks, self.counters, rooms, strict=True)
        ]
        self.ids = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=like.device)
        # Rows begin where matrix products can write them whole.
        width = -(-like.shape[0] // ALIGNED_TO) * ALIGNED_TO
        self.logits = like.new_zeros(batch, width)[:, : like.shape[0]]

    @property
    def nbytes(self) -> int:
        """Of keys, values, convolution inputs and states."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        layers = (layer for stack in self.stacks for layer in stack.layers)
        return [tensor for layer in layers for tensor in layer.tensors]

    def clear(self) -> None:
        """Nothing has been seen."""
        self.counters.zero_()
        self.ids.zero_()
        self.finished.zero_()
        for tensor in self.tensors:
            tensor.zero_()

    def settle(self, seen: DecodingState) -> None:
        """Prefill is over."""
        found = (seen.embedding, seen.language)[-len(self.stacks) :]
        for stack, state in zip(self.stacks, found, strict=True):
            stack.settle(state)

    def take_over(self, other: States) -> None:
        """Be where `other` is, of as many rows and with no more room."""
        for own, theirs in zip(self._small, other._small, strict=True):
            own.copy_(theirs)
        for own, theirs in zip(self.tensors, other.tensors, strict=True):
            # Keys and values are shorter there in their third dimension, all else is as long.
            own[:, :, : theirs.shape[2]].copy_(theirs)

    @property
    def _small(self) -> list[Tensor]:
        """What there is beside the layers' memory."""
        found = [self.counters, self.ids, self.finished, self.logits]
        return found + [x for stack in self.stacks for x in (stack.starts, stack.inv_freq)]

    def pretend(self, columns: int, rng: torch.Generator) -> None:
        """Be as after a prompt of so many columns, with random contents; `rng` of our device."""
        for tensor in self.tensors:
            _randomize(tensor, rng)
        self.seen(columns)

    def seen(self, columns: int) -> None:
        """`settle` after so many columns, as many in every row."""
        state = DecodingState()
        found = (state.embedding, state.language)[-len(self.stacks) :]
        for stack, one in zip(self.stacks, found, strict=True):
            one.length = columns
            one.inv_freq = inverse_frequencies(stack.plan.config, columns, self.ids.device)
        self.settle(state)


def states_size(plan: ModelPlan, batch: int, rooms: tuple[int, ...]) -> int:
    """Bytes that keys and values of such `States` will take; all else is small beside them."""
    size = plan.text_embedding.element_size()
    return sum(
        kv_cache_bytes(stack.config, batch, room, size)
        for stack, room in zip(plan.stacks, rooms, strict=True)
        for layer in stack.layers
        if isinstance(layer.mixer, AttentionPlan)
    )


def _empty_layer(layer: LayerPlan, like: Tensor, batch: int, room: int) -> KeysValues | ScanState:
    mixer = layer.mixer
    if isinstance(mixer, AttentionPlan):
        shape = (batch, mixer.kv_heads, room, mixer.head_dim)
        return KeysValues(like.new_zeros(shape), like.new_zeros(shape))
    channels, width = mixer.weights.conv_weight.shape
    shape = (batch, mixer.heads, mixer.head_dim, mixer.head_dim)
    return ScanState(
        conv=like.new_zeros(batch, channels, width - 1),
        ring=like.new_zeros(batch, channels, width) if mixer.is_plain else None,
        ssm=torch.zeros(shape, dtype=compute_dtype(like), device=like.device),
    )


def _randomize(tensor: Tensor, rng: torch.Generator) -> None:
    """Normal numbers, repeated along the third dimension where that is long."""
    shape = list(tensor.shape)
    shape[2] = min(shape[2], BLOCK)
    block = torch.randn(shape, generator=rng, device=tensor.device).to(tensor)
    for start in range(0, tensor.shape[2], BLOCK):
        part = tensor[:, :, start : start + BLOCK]
        part.copy_(block[:, :, : part.shape[2]])


class _Keys:
    """An attention layer's memory while a prompt is read."""

    def __init__(self, memory: KeysValues):
        self.memory = memory
        self.seen = 0

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, P); all that was seen."""
        begin, self.seen = self.seen, self.seen + keys.shape[2]
        self.memory.keys[:, :, begin : self.seen].copy_(keys)
        self.memory.values[:, :, begin : self.seen].copy_(values)
        return self.memory.keys[:, :, : self.seen], self.memory.values[:, :, : self.seen]


class _Scan:
    """A Mamba-2 layer's memory while a prompt is read, named as transformers' layers name it."""

    def __init__(self, memory: ScanState):
        self.has_previous_state = [False]
        self.conv_states, self.recurrent_states = [memory.conv], [memory.ssm]


class PrefillCache:
    """As much of a transformers cache as the mixers ask for, over memory of ours."""

    def __init__(self, states: States):
        self.decoding_state = DecodingState()
        self.layers = [
            _Keys(layer) if isinstance(layer, KeysValues) else _Scan(layer)
            for stack in states.stacks
            for layer in stack.layers
        ]

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
