"""The operations of HoVLE-2.6B's decoding step with random weights, and GPU timing.

There is one copy of weights, states and caches per layer of the model, used in turn by the CUDA
graph, so that no data is in the GPU's cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli import ops
from mmmamba_cli.ops import triton_utils
from mmmamba_cli.ops.decode import MixerWeights
from mmmamba_cli.ops.projection import Int8Weight, quantize_rows

DEVICE, DTYPE = "cuda", torch.bfloat16
LAYERS, WIDTH, HEADS, KV_HEADS, DIM, FFN, VOCABULARY, TAPS = 32, 2048, 16, 8, 128, 8192, 92553, 2
CHANNELS = (HEADS + 2 * KV_HEADS) * DIM
COLUMNS = 103424
EPS = 1e-5
# A head exceeds the L2 cache, so a few copies are enough.
HEAD_COPIES, CACHE_COPIES = 4, 3
GATE = 2e-2
Weight = Tensor | Int8Weight


@dataclass(frozen=True)
class Product:
    """A projection of a layer: its weight's shape, and the fused prologue and epilogue."""

    rows: int
    dim: int
    norm: int = 0
    gate: bool = False
    swiglu: bool = False
    residual: bool = False

    @property
    def copies(self) -> int:
        return HEAD_COPIES if self.rows == VOCABULARY else LAYERS

    def options(self, batch: int, int8: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"eps": EPS, "swiglu": self.swiglu}
        if self.norm:
            found |= norm_options(self.norm, int8)
        if self.gate:
            found["gate"] = normal(batch, self.dim)
        if self.residual:
            found["residual"] = normal(batch, self.rows)
        return found


PRODUCTS = {
    "v|k|q|gate|dt": Product(CHANNELS + HEADS * DIM + HEADS, WIDTH, norm=WIDTH),
    "W_O": Product(WIDTH, HEADS * DIM, norm=DIM, gate=True, residual=True),
    "w1|w3": Product(2 * FFN, WIDTH, norm=WIDTH, swiglu=True),
    "w2": Product(WIDTH, FFN, residual=True),
    "head": Product(VOCABULARY, WIDTH, norm=WIDTH),
}


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, device=DEVICE).mul_(scale).to(dtype or DTYPE)


def norm_options(size: int, int8: bool) -> dict[str, Any]:
    """Norm weights in fp32, or folded into the int8 weights that follow."""
    return {"norm_dim": size} if int8 else {"norm": torch.rand(size, device=DEVICE).add(0.5)}


def make_weights(product: Product, int8: bool, copies: int | None = None) -> list[Weight]:
    scale = product.dim**-0.5
    made = (normal(product.rows, product.dim, scale=scale) for _ in range(copies or product.copies))
    return [quantize_rows(weight) if int8 else weight for weight in made]


def graph_ms(call: Callable[[], object], seconds: float = 0.25) -> float:
    """Median milliseconds of one replay of everything that `call` launches."""
    side = torch.cuda.Stream()
    # Wait for the inputs: a position that is not written yet is arbitrary.
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < 10 or time.perf_counter() < until:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def rates(ms: float, launches: int, moved: int) -> dict[str, float]:
    """Microseconds and GB/s of one of `launches`, each of which moves `moved` bytes."""
    each = ms / launches
    return {"us": round(1e3 * each, 2), "gb_per_s": round(moved / each / 1e6, 1)}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def gate(found: Tensor, wanted: Tensor, most: float = GATE) -> float:
    """The relative error by 2-norm. Raises `AssertionError` if it is not below `most`."""
    error = relative_error(found, wanted)
    if not error < most:
        raise AssertionError(f"relative error {error:.3g}, allowed is {most}")
    return error


def attempt(call: Callable[[], Any]) -> Any:
    """The result, or the error as text, so that the other measurements of a run survive."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        return {"failed": f"{type(error).__name__}: {error}"[:2000]}


def overlapped(on: bool) -> None:
    triton_utils.ENABLE_PDL = on


def wide(options: dict[str, Any]) -> dict[str, Any]:
    return {n: v.float() if isinstance(v, Tensor) else v for n, v in options.items()}


def mixer_weights() -> MixerWeights:
    rates = -torch.rand(HEADS, device=DEVICE).add(0.01)
    bias, skip = (torch.randn(HEADS, device=DEVICE) for _ in range(2))
    return MixerWeights(normal(CHANNELS, TAPS), normal(CHANNELS), rates, bias, skip)


def mixer_arguments(batch: int) -> tuple[Tensor, ...]:
    """vkq, dt, ring buffer, state and position; the first two are slices of one wide row."""
    row = normal(batch, PRODUCTS["v|k|q|gate|dt"].rows)
    state = torch.randn(batch, HEADS, DIM, DIM, device=DEVICE)
    position = torch.full((1,), 1001, device=DEVICE)
    return row[:, :CHANNELS], row[:, -HEADS:], normal(batch, CHANNELS, TAPS), state, position


def attention_arguments(columns: int) -> tuple[Tensor, ...]:
    row = normal(1, (HEADS + 2 * KV_HEADS) * DIM).view(1, -1, DIM)
    q, k, v = row.split((HEADS, KV_HEADS, KV_HEADS), 1)
    keys, values = (normal(1, KV_HEADS, columns, DIM) for _ in range(2))
    return q, k, v, keys, values, torch.full((1,), columns - 1, device=DEVICE)


def product_ms(product: Product, weights: list[Weight], batch: int, seconds: float) -> float:
    int8 = isinstance(weights[0], Int8Weight)
    x, options = normal(batch, product.dim), product.options(batch, int8)

    def call() -> None:
        for weight in weights:
            ops.project(x, weight, **options, backend="triton")

    return graph_ms(call, seconds)
