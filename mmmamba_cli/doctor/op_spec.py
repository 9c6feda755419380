"""What a test case of an op is, and random inputs, padding and packing for cases.

Legend: B batch, T tokens, H query heads, K key/value heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Arguments by name. Any instead of Tensor, because mypy checks `**` against all parameters.
Tensors = dict[str, Any]
# (inputs, constants, backend) -> outputs.
Call = Callable[[Tensors, Tensors, str], tuple[Tensor, ...]]

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 32
TAPS = 4
# Prompt lengths: a single token, and no multiples of 8 or of a chunk; 131 needs two chunks.
LENGTHS = (1, 37, 131)


@dataclass(frozen=True)
class OpCase:
    """One test case of an op.

    inputs: fp64 tensors on the CPU, whose gradients are compared.
    constants: masks, ids and positions.
    fp32_inputs: names of inputs that a bf16 model keeps in fp32.
    """

    name: str
    call: Call
    inputs: Tensors
    constants: Tensors = field(default_factory=dict)
    fp32_inputs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class OpSpec:
    """A public op: its backends, the name of its reference backend, and its cases.

    needs_backward: whether backends must have gradients, except those in `forward_only`.
    optional: backends of other libraries; `auto` skips them if they are wrong, so an error is only
        a warning.
    """

    name: str
    backends: Mapping[str, Callable[..., Any]]
    reference: str
    cases: tuple[OpCase, ...]
    needs_backward: bool = True
    forward_only: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


class RandomInputs:
    """Seeded random numbers in fp64, equal on every machine."""

    def __init__(self, seed: int):
        self._rng = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._rng, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self._rng, dtype=torch.float64)


def padding_mask(length: int) -> Tensor:
    """(B, T): left padding in one row, right padding in the other."""
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    mask[0, : length // 5] = False
    mask[1, -(length // 4) :] = False
    return mask


def packed_ids(length: int) -> Tensor:
    """(B, T): three sequences per row, with different boundaries in each row."""
    columns = torch.arange(length)
    return torch.stack([(columns > c).long() + (columns > 2 * c).long() for c in (5, length // 3)])
