"""How a call of the scan is cut up for the kernels: chunks, spans and launches.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mmmamba_cli.ops.triton_utils import dot_type


class Launch(NamedTuple):
    """How the kernels of one direction are cut up: columns of a tile, warps, pipeline stages."""

    tile: int
    warps: int
    stages: int


class Tuning(NamedTuple):
    """Tokens of a chunk, launches of `span_states` and of `span_outputs` both ways, and spans.

    `few_states` is for so few spans that a program for each head would leave processors idle.
    `programs` of `span_outputs` run at the same time, two on each of an H100's 132 processors; a
    span has `most_chunks` at most.
    """

    chunk: int
    states: Launch
    few_states: Launch
    forward: Launch
    backward: Launch
    programs: int = 264
    most_chunks: int = 16


# Fixed, not searched for at run time: a result must not depend on what else the machine is doing.
# `benchmarks/kernels.py --tune` times the alternatives.
TUNING = {
    tl.bfloat16: Tuning(
        64,
        states=Launch(128, 8, 2),
        few_states=Launch(64, 4, 3),
        forward=Launch(64, 4, 2),
        backward=Launch(64, 4, 2),
    ),
    tl.float32: Tuning(64, *4 * (Launch(32, 4, 1),)),
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

    @property
    def states(self) -> Launch:
        """Of `span_states`: with a program for each head and span, or with several."""
        few = 2 * self.batch * self.heads * self.spans < self.tuning.programs
        return self.tuning.few_states if few else self.tuning.states

    @property
    def paired(self) -> bool:
        """Whether pairs within chunks are summed on the way; fp32 sums them apart, in fp64."""
        return self.dtype != tl.float32


class Steps(NamedTuple):
    """What `kernels.prepare` makes of dt: (B, H, padded T) each, `through` (B, H, chunks)."""

    step: Tensor
    high: Tensor
    low: Tensor
    from_start: Tensor
    to_end: Tensor
    through: Tensor


def plan(x: Tensor, B: Tensor, C: Tensor, trains: bool) -> Sizes:
    """x (B, T, K, P), B (B, T, K, N), C (B, T, H, N); `trains` says that gradients are wanted."""
    batch, length, kv_heads, P = x.shape
    heads, N = C.shape[2:]
    dtype = dot_type(x, B, C)
    tuning = TUNING[dtype]
    chunks = triton.cdiv(length, tuning.chunk)
    tiles = triton.cdiv(max(P, N), tuning.forward.tile)
    per_span = _chunks_of_span(chunks, batch * heads * tiles, tuning)
    if trains and dtype == tl.float32:
        # What passes through a chunk of several is a difference, which costs fp32 its digits.
        per_span = 1
    spans = triton.cdiv(chunks, per_span)
    share = heads // kv_heads
    return Sizes(batch, length, heads, share, P, N, dtype, tuning, chunks, per_span, spans)


def _chunks_of_span(chunks: int, programs: int, tuning: Tuning) -> int:
    """What is done first, where so many programs walk through each span.

    They run in waves. A span takes as long as its chunks, and about one more for the state that it
    begins with; with the same time, long spans cost fewer states in memory.
    """

    def time(length: int) -> int:
        waves = triton.cdiv(triton.cdiv(chunks, length) * programs, tuning.programs)
        return waves * (length + 1)

    return min(range(min(tuning.most_chunks, chunks), 0, -1), key=time)
