"""The least that a token or a prompt costs: what has to be read, and what has to be multiplied.

A floor is no promise: it leaves out activations, norms, convolutions and every launch. Legend: B
batch, T columns, H query heads, K key/value heads, P head dim, which is the state's width too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmamba_cli.model import ATTENTION, HolisticVLM, HolisticVLMConfig
from mmmamba_cli.profiling.contract import Cost

STATE_BYTES = 4
# A product and a sum.
MULTIPLY_ADD = 2


@dataclass(frozen=True)
class ReadWeights:
    """Of the blocks with the norm behind them, and of the head: bytes, and elements of matrices.

    The token table is left out, of which a row is read, and what only images pass.
    """

    block_bytes: int
    block_elements: int
    head_bytes: int
    head_elements: int

    @property
    def bytes(self) -> int:
        return self.block_bytes + self.head_bytes


def read_weights(model: HolisticVLM) -> ReadWeights:
    blocks = _held((*model.model.blocks, model.model.norm))
    head = _held((model.lm_head,))
    return ReadWeights(
        block_bytes=sum(t.nbytes for t in blocks),
        block_elements=sum(t.numel() for t in blocks if t.dim() == 2),
        head_bytes=sum(t.nbytes for t in head),
        head_elements=sum(t.numel() for t in head if t.dim() == 2),
    )


def cost_of(
    config: HolisticVLMConfig,
    weights: ReadWeights,
    dtype: torch.dtype,
    batch: int,
    context: int,
    prefill: bool,
) -> Cost:
    """Of one more token of each row after `context` others; with `prefill`, of reading these.

    A token reads all weights once, keys and values of its context, and reads and writes each state.
    A prompt writes its keys, values and states, and multiplies: of T x T scores a causal half, and
    no more for a state than its updates and read-outs one by one.
    """
    columns = context if prefill else 1
    size = weights.bytes
    rows = batch * columns
    # Of a prompt, only the last column wants logits.
    operations = MULTIPLY_ADD * (rows * weights.block_elements + batch * weights.head_elements)
    for layer, kind in enumerate(config.layer_types):
        stack = config.stack_of(layer)
        heads, width = stack.num_heads, stack.head_dim
        if kind == ATTENTION:
            size += 2 * batch * context * stack.num_kv_heads * width * dtype.itemsize
            pairs = context * (context + 1) // 2 if prefill else context
            operations += batch * 2 * MULTIPLY_ADD * pairs * heads * width
        else:
            state = heads * width**2
            size += batch * state * STATE_BYTES * (1 if prefill else 2)
            operations += rows * 2 * MULTIPLY_ADD * state
    return Cost(size, operations)


def _held(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters, and the buffers of int8 layers, each once."""
    found: dict[int, Tensor] = {}
    for module in modules:
        found.update({id(t): t for t in (*module.parameters(), *module.buffers())})
    return list(found.values())
