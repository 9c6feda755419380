"""Memory of ours as a model's modules know it, while they read a prompt into it.

Legend: B batch, K key/value heads, T columns, P head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmmamba_cli.decoding.states import KeysValues, ScanState, States
from mmmamba_cli.model.cache import DecodingState


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
