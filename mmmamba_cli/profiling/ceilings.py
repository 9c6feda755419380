"""How fast this device copies and multiplies: what floors are made of, measured, not looked up."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from mmmamba_cli.profiling.contract import Cost
from mmmamba_cli.profiling.instruments import Instruments, or_out_of_memory
from mmmamba_cli.profiling.result import CeilingsPart

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
