"""Launch configuration of the scan kernels: chunk size, spans, tiles, num_warps and num_stages.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim. A span is a
run of consecutive chunks that one program processes in order.
"""

from functools import cache
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from mmmamba_cli.ops.triton_utils import cdiv, dot_type


class Launch(NamedTuple):
    """Configuration of one kernel: columns of a program's tile, num_warps and num_stages."""

    tile: int
    warps: int
    stages: int


class Tuning(NamedTuple):
    """Configuration of all scan kernels for one dtype.

    chunk: tokens per chunk.
    states, few_states: `span_states`; the second for grids of too few spans to fill the GPU, where
        smaller tiles give more programs.
    forward, backward: `span_outputs` of the two passes.
    programs: programs of `span_outputs` that run at once, two on each of an H100's 132 SMs.
    most_chunks: the maximum number of chunks per span.
    """

    chunk: int
    states: Launch
    few_states: Launch
    forward: Launch
    backward: Launch
    programs: int = 264
    most_chunks: int = 16


# Constants instead of runtime autotuning, so that results do not depend on the load of the
# machine. `benchmarks/kernels.py --tune` times the alternatives.
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


class ScanPlan(NamedTuple):
    """Sizes that all launches of one call share; `group_size` query heads per key/value head."""

    batch: int
    length: int
    heads: int
    group_size: int
    P: int
    N: int
    dtype: tl.dtype
    tuning: Tuning
    chunks: int
    # Chunks per span.
    per_span: int
    spans: int

    @property
    def padded(self) -> int:
        """T rounded up to whole chunks."""
        return self.chunks * self.tuning.chunk

    @property
    def states(self) -> Launch:
        """The configuration of `span_states`; see `Tuning`."""
        few = 2 * self.batch * self.heads * self.spans < self.tuning.programs
        return self.tuning.few_states if few else self.tuning.states

    @property
    def pairs_in_outputs(self) -> bool:
        """Whether `span_outputs` computes `PairSums`; for fp32, `decay_gradients` does in fp64."""
        return self.dtype != tl.float32


class Decays(NamedTuple):
    """Step sizes and decays that `kernels.prepare_decays` computes, in fp32.

    (B, H, padded T) each, `chunk_decay` (B, H, chunks); `kernels.py` defines them.
    """

    step: Tensor
    high: Tensor
    low: Tensor
    from_start: Tensor
    to_end: Tensor
    chunk_decay: Tensor


def plan_scan(x: Tensor, B: Tensor, C: Tensor, trains: bool) -> ScanPlan:
    """The plan for x (B, T, K, P), B (B, T, K, N) and C (B, T, H, N).

    `trains` says whether a backward pass follows.
    """
    batch, length, kv_heads, P = x.shape
    heads, N = C.shape[2:]
    dtype = dot_type(x, B, C)
    tuning = TUNING[dtype]
    chunks = cdiv(length, tuning.chunk)
    tiles = cdiv(max(P, N), tuning.forward.tile)
    per_span = _chunks_per_span(chunks, batch * heads * tiles, tuning)
    if trains and dtype == tl.float32:
        # With several chunks per span, the gradient of a chunk's decay is a difference of sums,
        # which loses too many bits of fp32.
        per_span = 1
    spans = cdiv(chunks, per_span)
    group_size = heads // kv_heads
    return ScanPlan(batch, length, heads, group_size, P, N, dtype, tuning, chunks, per_span, spans)


@cache
def _chunks_per_span(chunks: int, programs: int, tuning: Tuning) -> int:
    """The number of chunks per span that minimizes the estimated time of `span_outputs`.

    Each span is processed by `programs` programs, of which `tuning.programs` run at once; the rest
    wait for the next wave. A program takes the time of its chunks plus about one more to load the
    span's initial state. Ties go to longer spans, which need less memory for states.
    """

    def time(length: int) -> int:
        waves = cdiv(cdiv(chunks, length) * programs, tuning.programs)
        return waves * (length + 1)

    return min(range(min(tuning.most_chunks, chunks), 0, -1), key=time)
