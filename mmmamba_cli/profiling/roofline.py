"""Roofline: lower bound of the time of a token or prompt, from bytes, operations and device rates.

The rates are measured, not looked up. The bound leaves out activations, norms, convolutions and
launch overhead. Legend: B batch, T columns, H query heads, K key/value heads, P head dim and state
width.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmamba_cli.architecture import kv_cache_bytes, layer_cache_bytes, spec_of
from mmmamba_cli.devices import translate_out_of_memory
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig
from mmmamba_cli.profiling.interfaces import Cost
from mmmamba_cli.profiling.result import RooflinePart
from mmmamba_cli.profiling.timers import DeviceTimer

# Bytes to copy, far more than any cache holds, and the side of the square matrices to multiply.
CUDA_COPY_BYTES, CPU_COPY_BYTES = 2**30, 2**28
CUDA_MATRIX_SIDE, CPU_MATRIX_SIDE = 8192, 1024
REPEATS, WARM_UPS = 7, 3
# A run of this length is not repeated: a CPU without instructions for bf16 takes seconds.
LONG_SECONDS = 0.5
# Operations of a multiply-add.
MULTIPLY_ADD = 2


def measure_roofline(
    device: torch.device, dtype: torch.dtype, timer: DeviceTimer, seed: int = 0
) -> RooflinePart:
    """Measure the copy rate and the matmul rate in `dtype`: medians of a few large ones.

    Raises:
        OutOfMemory: if there is no memory for them.
    """
    is_cuda = device.type == "cuda"
    size, side = (
        (CUDA_COPY_BYTES, CUDA_MATRIX_SIDE) if is_cuda else (CPU_COPY_BYTES, CPU_MATRIX_SIDE)
    )

    def work() -> RooflinePart:
        rng = torch.Generator(device).manual_seed(seed)
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy_seconds = _median(lambda: target.copy_(source), timer)
        a, b = (torch.randn(side, side, generator=rng, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        matmul_seconds = _median(lambda: torch.mm(a, b, out=product), timer)
        # Each byte is read and written.
        return RooflinePart(
            copy_rate=2 * size / copy_seconds,
            matmul_rate=MULTIPLY_ADD * side**3 / matmul_seconds,
            side=side,
            size=size,
        )

    found = translate_out_of_memory(work)
    timer.empty_cache()
    return found


def roofline_seconds(cost: Cost, roofline: RooflinePart) -> float:
    """Seconds to move the bytes or to do the operations, whichever is longer."""
    return max(cost.bytes / roofline.copy_rate, cost.operations / roofline.matmul_rate)


def _median(work: Callable[[], object], timer: DeviceTimer) -> float:
    work()
    seconds = timer.seconds(work)
    if seconds > LONG_SECONDS:
        return seconds
    for _ in range(WARM_UPS - 2):
        work()
    return statistics.median(timer.seconds(work) for _ in range(REPEATS))


@dataclass(frozen=True)
class WeightCounts:
    """Weights read per token: bytes and matrix elements of blocks (with the final norm) and head.

    The token table, of which one row is read, and the vision weights are left out.
    """

    block_bytes: int
    block_elements: int
    head_bytes: int
    head_elements: int

    @property
    def bytes(self) -> int:
        return self.block_bytes + self.head_bytes

    def operations(self, batch: int, columns: int) -> int:
        """Operations of the products with them for `columns` columns of each row."""
        # Only the last column of a prompt needs logits.
        rows = batch * columns * self.block_elements + batch * self.head_elements
        return MULTIPLY_ADD * rows


def count_weights(model: HolisticVLM) -> WeightCounts:
    return weight_counts((*model.model.blocks, model.model.norm), model.lm_head)


def weight_counts(layers: Iterable[nn.Module], output_head: nn.Module) -> WeightCounts:
    """The weights of the layers of a decoder, with its final norm, and of its head."""
    blocks = _unique_tensors(layers)
    head = _unique_tensors((output_head,))
    return WeightCounts(
        block_bytes=sum(t.nbytes for t in blocks),
        block_elements=sum(t.numel() for t in blocks if t.dim() == 2),
        head_bytes=sum(t.nbytes for t in head),
        head_elements=sum(t.numel() for t in head if t.dim() == 2),
    )


def minimum_cost(
    config: HolisticVLMConfig,
    weights: WeightCounts,
    dtype: torch.dtype,
    batch: int,
    context: int,
    prefill: bool,
) -> Cost:
    """Minimum cost of one decode step after `context` tokens, or of their prefill.

    A decode step reads all weights once and the keys and values of its context, and reads and
    writes each SSM state. A prefill writes keys, values and states; it computes the causal half of
    the T x T scores, and one update and one read-out of the state per column.
    """
    columns = context if prefill else 1
    caches = layer_cache_bytes(config, batch, context, dtype.itemsize)
    size = weights.bytes
    operations = weights.operations(batch, columns)
    for layer in range(config.num_hidden_layers):
        stack, spec = config.stack_of(layer), spec_of(config, layer)
        # A window has room for more columns than a short context fills.
        filled = kv_cache_bytes(stack, batch, context, dtype.itemsize)
        size += min(caches[layer].kv_cache, filled)
        size += caches[layer].ssm_state * (1 if prefill else 2)
        products = spec.operations(stack, config.mixer_config, columns, context)
        operations += batch * MULTIPLY_ADD * products
    return Cost(size, operations)


def _unique_tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters, and the buffers of int8 layers, without duplicates."""
    found: dict[int, Tensor] = {}
    for module in modules:
        found.update({id(t): t for t in (*module.parameters(), *module.buffers())})
    return list(found.values())
