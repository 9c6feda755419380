"""The least that a token or a prompt costs: what has to be read, and what has to be multiplied.

A floor is no promise: it leaves out activations, norms, convolutions and every launch. Legend: B
batch, T columns, H query heads, K key/value heads, P head dim, which is the state's width too.

How fast this device copies and multiplies: what floors are made of, measured, not looked up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmamba_cli.model import ATTENTION, HolisticVLM, HolisticVLMConfig
from mmmamba_cli.profiling.interfaces import Cost
from mmmamba_cli.profiling.result import CeilingsPart
from mmmamba_cli.profiling.timers import Instruments, or_out_of_memory

# Bytes that are copied, far above any cache, and the side of the square matrices.
CUDA_BYTES, CPU_BYTES = 2**30, 2**28
CUDA_SIDE, CPU_SIDE = 8192, 1024
REPEATS, WARM_UP = 7, 3


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, meter: Instruments, seed: int = 0
) -> CeilingsPart:
    """Medians of a few large copies and matrix products in `dtype`. Raises `OutOfMemory`."""
    is_cuda = device.type == "cuda"
    size, side = (CUDA_BYTES, CUDA_SIDE) if is_cuda else (CPU_BYTES, CPU_SIDE)

    def work() -> CeilingsPart:
        rng = torch.Generator(device).manual_seed(seed)
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copied = _median(lambda: target.copy_(source), meter)
        a, b = (torch.randn(side, side, generator=rng, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        multiplied = _median(lambda: torch.mm(a, b, out=product), meter)
        # Each byte is read and written.
        return CeilingsPart(
            copy_rate=2 * size / copied, matmul_rate=2 * side**3 / multiplied, side=side, size=size
        )

    found = or_out_of_memory(work)
    meter.clean()
    return found


def floor_of(cost: Cost, ceilings: CeilingsPart) -> float:
    """Seconds: of moving the bytes and of multiplying, whichever takes longer."""
    return max(cost.bytes / ceilings.copy_rate, cost.operations / ceilings.matmul_rate)


def _median(work: Callable[[], object], meter: Instruments) -> float:
    for _ in range(WARM_UP):
        work()
    return statistics.median(meter.seconds(work) for _ in range(REPEATS))


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
