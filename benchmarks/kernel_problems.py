"""Problems of `kernels.py`: ops at HoVLE-2.6B's shapes, their inputs and backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mmmamba_cli import ops
from mmmamba_cli.ops.attention import VarlenMetadata, varlen_metadata
from mmmamba_cli.ops.ssd.mamba_ssm import library_kernels as mamba_kernels

HEADS, KV_HEADS, DIM, WIDTH, TAPS, EPS = 16, 8, 128, 2048, 2, 1e-5
# Tokens of a typical conversation about a picture.
SAMPLE = 700
CHANNELS = (HEADS + 2 * KV_HEADS) * DIM

Tensors = dict[str, Tensor]
Call = Callable[[Tensors], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """An op at one shape: `make(length, seed)` returns its tensors, `wanted` the reference."""

    op: str
    batch: int
    length: int
    make: Callable[[int, int, int], Tensors]
    wanted: Call
    trains: bool = True
    backends: tuple[str, ...] = ("triton", "reference")

    @property
    def name(self) -> str:
        return f"{self.op} {self.batch} x {self.length}"


class Place:
    """Device and dtype of all problems."""

    def __init__(self, small: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.float32 if small else torch.bfloat16
        self.small = small

    def normal(self, seed: int, **shapes: tuple[int, ...]) -> Tensors:
        rng = torch.Generator(self.device).manual_seed(seed)
        return {
            name: torch.randn(shape, generator=rng, device=self.device, dtype=self.dtype)
            for name, shape in shapes.items()
        }

    def scan(self, batch: int, length: int, seed: int) -> Tensors:
        heads, kv_heads, dim = (4, 2, 16) if self.small else (HEADS, KV_HEADS, DIM)
        made = self.normal(
            seed,
            x=(batch, length, kv_heads, dim),
            dt=(batch, length, heads),
            B=(batch, length, kv_heads, dim),
            C=(batch, length, heads, dim),
        )
        made["B"] = made["B"] / math.sqrt(dim)
        # Decays from 0.98 to 0.2 per token, as in seeded and trained models.
        made["A"] = -torch.linspace(0.25, 16, heads, device=self.device)
        made["dt_bias"] = torch.linspace(-2.5, -3.5, heads, device=self.device)
        return made

    def conv(self, batch: int, length: int, seed: int) -> Tensors:
        channels = 48 if self.small else CHANNELS
        shapes = {"x": (batch, length, channels), "weight": (channels, TAPS), "bias": (channels,)}
        return self.normal(seed, **shapes)

    def gated(self, batch: int, length: int, seed: int) -> Tensors:
        shape = (batch, length, HEADS, DIM)
        return self.normal(seed, y=shape, gate=shape, weight=(DIM,))

    def norm(self, batch: int, length: int, seed: int) -> Tensors:
        return self.normal(seed, x=(batch, length, WIDTH), weight=(WIDTH,))

    def attention(self, batch: int, length: int, seed: int) -> Tensors:
        heads, kv_heads, dim = (4, 2, 16) if self.small else (HEADS, KV_HEADS, DIM)
        kept = (batch, kv_heads, length, dim)
        return self.normal(seed, q=(batch, heads, length, dim), k=kept, v=kept)

    def problems(self) -> Iterator[Problem]:
        lengths = (24, 40, 72) if self.small else (4096, 32768, 103424)
        short, middle, long = lengths
        for batch, length in ((1, short), (4, short), (1, middle)):
            yield Problem("ssd", batch, length, self.scan, scan("chunked"))
        yield Problem("ssd", 1, long, self.scan, scan("chunked"), trains=False)
        for length in (short, middle):
            yield Problem("causal_conv", 1, length, self.conv, _conv("reference"))
            yield Problem("gated_rms_norm", 1, length, self.gated, _gated("reference"))
            yield Problem("rms_norm", 1, length, self.norm, _norm("reference"))
        kernels = ("sdpa",) if self.small else ("flash", "sdpa")
        for op, attend in (("attention", _attention), ("attention, packed", _packed)):
            wanted = attend("reference")
            yield Problem(op, 2, short, self.attention, wanted, backends=kernels)


def _conv(backend: str) -> Call:
    return lambda t: ops.causal_conv(**t, backend=backend)[:1]


def _gated(backend: str) -> Call:
    return lambda t: (ops.gated_rms_norm(**t, eps=EPS, backend=backend),)


def _norm(backend: str) -> Call:
    return lambda t: (ops.rms_norm(**t, eps=EPS, backend=backend),)


def _attention(backend: str) -> Call:
    return lambda t: (ops.attention(**t, is_causal=True, backend=backend),)


def _packed(backend: str) -> Call:
    return lambda t: (ops.attention(**t, varlen=_varlen(t["q"]), backend=backend),)


def _varlen(q: Tensor) -> VarlenMetadata:
    return _packing(q.shape[0], q.shape[2], q.device)


@cache
def _packing(batch: int, length: int, device: torch.device) -> VarlenMetadata:
    """Segments of rows packed with samples of `SAMPLE` tokens."""
    ids = torch.arange(length, device=device).div(SAMPLE, rounding_mode="floor")
    found = varlen_metadata(None, ids.expand(batch, -1))
    assert found is not None
    return found


def scan(backend: str) -> Call:
    return lambda t: ops.ssd(**t, dt_softplus=True, backend=backend)


def candidates(problem: Problem, mamba: bool) -> dict[str, Call]:
    """The backends to measure: kernels, the fallback without them, and mamba_ssm."""
    if problem.op == "ssd":
        found = {"triton": scan("triton")}
        return found | ({"mamba_ssm": mamba_scan} if mamba else {})
    calls = {
        "causal_conv": _conv,
        "gated_rms_norm": _gated,
        "rms_norm": _norm,
        "attention": _attention,
        "attention, packed": _packed,
    }
    return {backend: calls[problem.op](backend) for backend in problem.backends}


def repeated(made: Tensors) -> Tensors:
    """Keys and values repeated to every query head, as mamba_ssm needs them."""
    share = made["C"].shape[2] // made["x"].shape[2]
    return made | {n: made[n].repeat_interleave(share, dim=2) for n in ("x", "B")}


def mamba_scan(t: Tensors, state: bool = True) -> tuple[Tensor, ...]:
    """Call without the final state unless it is needed, because of its gradient."""
    found = mamba_kernels()(
        t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size=128, dt_bias=t["dt_bias"],
        dt_softplus=True, return_final_states=state,
    )  # fmt: skip
    return found if state else (found,)
