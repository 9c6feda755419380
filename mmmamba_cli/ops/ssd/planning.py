"""How a call of the scan is cut up for the kernels: chunks, spans and launches.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mmmamba_cli.ops.launching import dot_type


class Launch(NamedTuple):
    """How the kernels of one direction are cut up: columns of a tile, warps, pipeline stages."""

    tile: int
    warps: int
    stages: int


class Tuning(NamedTuple):
    """Tokens of a chunk, launches forwards and backwards, and the length of spans.

    A span is as long as leaves `span_outputs` that many `programs`, four for each of an H100's 132
    processors, and has `most_chunks` at most.
    """

    chunk: int
    forward: Launch
    backward: Launch
    programs: int = 528
    most_chunks: int = 16


# Fixed, not searched for at run time: a result must not depend on what else the machine is doing.
# `benchmarks/kernels.py --tune` times the alternatives.
TUNING = {
    tl.bfloat16: Tuning(64, forward=Launch(64, 4, 2), backward=Launch(64, 4, 2)),
    tl.float32: Tuning(64, forward=Launch(32, 4, 1), backward=Launch(32, 4, 1)),
}


class Sizes(NamedTuple):
    """What all launches of one call share."""

    batch: int
    length: int
    heads: int
    share: int
    P: int
    N: int
    dtype: tl.dtype
    tuning: Tuning
    chunks: int
    per_span: int
    spans: int

    @property
    def padded(self) -> int:
        return self.chunks * self.tuning.chunk


def plan(x: Tensor, B: Tensor, C: Tensor, trains: bool) -> Sizes:
    """x (B, T, K, P), B (B, T, K, N), C (B, T, H, N); `trains` says that gradients are wanted."""
    batch, length, kv_heads, P = x.shape
    heads, N = C.shape[2:]
    dtype = dot_type(x, B, C)
    tuning = TUNING[dtype]
    chunks = triton.cdiv(length, tuning.chunk)
    # Long spans cost fewer states in memory, short ones give every processor something to do.
    tiles = triton.cdiv(max(P, N), tuning.forward.tile)
    most = chunks * batch * heads * tiles // tuning.programs
    per_span = max(1, min(tuning.most_chunks, most))
    if trains and dtype == tl.float32:
        # What passes through a chunk of several is a difference, which costs fp32 its digits.
        per_span = 1
    spans = triton.cdiv(chunks, per_span)
    share = heads // kv_heads
    return Sizes(batch, length, heads, share, P, N, dtype, tuning, chunks, per_span, spans)
