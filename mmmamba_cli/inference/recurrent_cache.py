"""Convolution and recurrent states of a layer at fixed addresses.

Legend: B batch, T columns of a chunk, H query heads, P head dim, Ch channels, W convolution width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.ops.decode import to_ring_buffer


@dataclass(frozen=True)
class RecurrentCache:
    """Convolution and recurrent states of a layer.

    `conv` (B, Ch, W - 1) holds the last inputs of the convolution, oldest first, as prefill leaves
    them. A mixer with a fused step decodes from `ring` (B, Ch, W) instead: column t is in slot
    t % W. `ssm` is (B, H, P, P) in fp32.
    """

    conv: Tensor
    ring: Tensor | None
    ssm: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.conv, self.ssm) if self.ring is None else (self.conv, self.ring, self.ssm)

    def finish_prefill(self, length: int) -> None:
        """Fill the ring buffer."""
        if self.ring is not None:
            self.ring.copy_(to_ring_buffer(self.conv, length))

    def module_layer(self) -> ModuleRecurrentCache:
        return ModuleRecurrentCache(self.conv, self.ssm)


class ModuleRecurrentCache:
    """A cache during prefill, with the attribute names of transformers' cache layers."""

    def __init__(self, conv: Tensor, state: Tensor):
        self.has_previous_state = [False]
        self.conv_states, self.recurrent_states = [conv], [state]


def last_columns(inputs: Tensor, length: Tensor, count: int) -> Tensor:
    """The last `count` of the first `length` (1,) columns of (B, T, Ch), as (B, Ch, count).

    Zeros where there are fewer. Does not synchronize.
    """
    indices = length - count + torch.arange(count, device=length.device)
    found = inputs.index_select(1, indices.clamp(min=0))
    return found.masked_fill((indices < 0).view(1, -1, 1), 0).transpose(1, 2)
