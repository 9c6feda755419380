"""Launches of the kernels that only the scan's backward pass needs.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmmamba_cli.ops.ssd import backward_kernels as kernels
from mmmamba_cli.ops.ssd.launch_config import Decays, ScanPlan
from mmmamba_cli.ops.triton_utils import block_size, buffer, cdiv, launch_grid, or_dummy

# A chunk decay below this is treated as 0 in the gradient: fp32 rounding of the terms it is
# subtracted from is larger.
MIN_DECAY = 2.0**-20


class Tokens(NamedTuple):
    """x (B, T, K, P), B (B, T, K, N), C (B, T, H, N) and the gradient dy (B, T, H, P)."""

    x: Tensor
    B: Tensor
    C: Tensor
    dy: Tensor

    @property
    def strides(self) -> list[int]:
        """Strides of batch, time and head of each; the last dimension is contiguous."""
        return [stride for tensor in self for stride in tensor.stride()[:3]]


class StateDots(NamedTuple):
    """Row-wise dot products of outputs and gradients, by tiles, (tiles, B, H, padded T) each.

    read: C . dC, for the part of dC that comes from the state at the start of the chunk; by tiles
        of N.
    written: dt x . dx, for the part of dx that goes through the state at the end of the chunk; by
        tiles of P.
    direct: x . dx before the factor dt, without the skip connection; by tiles of P.
    """

    read: Tensor
    written: Tensor
    direct: Tensor

    @classmethod
    def empty(cls, plan: ScanPlan, like: Tensor) -> StateDots:
        shape = (plan.batch, plan.heads, plan.padded)
        tile = plan.tuning.backward.tile
        n_tiles = cdiv(plan.N, min(tile, block_size(plan.N)))
        p_tiles = cdiv(plan.P, min(tile, block_size(plan.P)))
        return cls(*(buffer(tiles, *shape, like=like) for tiles in (n_tiles, p_tiles, p_tiles)))


class PairSums(NamedTuple):
    """Sums over pairs of tokens within a chunk, computed by `kernels.span_outputs`.

    decay: (2, tiles of N, B, H, padded T), gradients of the cumulative log decay of each token as
        the reader (to be added) and as the writer of a pair (to be subtracted).
    skip: (B, H, chunks), x . dy summed over each chunk.
    """

    decay: Tensor
    skip: Tensor

    @classmethod
    def empty(cls, plan: ScanPlan, like: Tensor) -> PairSums | None:
        """Empty buffers; None if `decay_gradients` computes the sums itself."""
        if not plan.pairs_in_outputs:
            return None
        tiles = cdiv(plan.N, min(plan.tuning.backward.tile, block_size(plan.N)))
        shape = (2, tiles, plan.batch, plan.heads, plan.padded)
        skip = buffer(plan.batch, plan.heads, plan.chunks, like=like)
        return cls(buffer(*shape, like=like), skip)


def decay_gradients(
    plan: ScanPlan,
    parameters: tuple[Tensor, Tensor, Tensor | None],
    tokens: Tokens,
    decays: Decays,
    real: Tensor | None,
    segments: Tensor | None,
    dots: StateDots,
    pairs: PairSums | None,
    products: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of dt (B, T, H) and, in fp32, of A, dt_bias and D (H,).

    `parameters` are dt, A and dt_bias; `products` come from `_pass_states` in reverse.
    """
    dt, A, dt_bias = parameters
    ddt = buffer(*dt.shape, like=dt, dtype=dt.dtype)
    sums = buffer(3, plan.batch, plan.chunks, plan.heads, like=dt)
    blocks = products.shape[-1]
    kernels.decay_gradients[launch_grid("ssd", plan.chunks, plan.heads, plan.batch)](
        dt, A.contiguous(), or_dummy(dt_bias, A), *tokens, or_dummy(real, A), or_dummy(segments, A),
        decays.step, decays.high, decays.low, decays.chunk_decay, *dots, products,
        *((products, products) if pairs is None else pairs), ddt, sums,
        plan.length, plan.heads, plan.padded, plan.spans, plan.per_span, blocks,
        dots.read.shape[0], dots.written.shape[0], 0 if pairs is None else pairs.decay.shape[1],
        *dt.stride(), *tokens.strides,
        GROUP=plan.group_size, P=plan.P, N=plan.N,
        BLOCK_P=block_size(plan.P), BLOCK_N=block_size(plan.N),
        BLOCKS=block_size(blocks, 1), Q=plan.tuning.chunk, SOFTPLUS=softplus,
        HAS_BIAS=dt_bias is not None, HAS_MASK=real is not None,
        HAS_SEGMENTS=segments is not None, ONE_CHUNK=plan.per_span == 1, MIN_DECAY=MIN_DECAY,
        HAS_PAIRS=pairs is not None, DTYPE=plan.dtype,
        PRECISION="tf32x3", num_warps=4, num_stages=1,
    )  # fmt: skip
    dA, dbias, dD = sums.sum((1, 2)).unbind(0)
    return ddt, dA, dbias, dD


# Rows per program and num_warps of `sum_heads`, tuned for dim 128.
SUM_ROWS, SUM_WARPS = 16, 4


def sum_groups(gradient: Tensor, plan: ScanPlan) -> Tensor:
    """Sum a contiguous gradient (B, T, H, dim) over the query heads of a group: (B, T, K, dim)."""
    if plan.group_size == 1:
        return gradient
    kv_heads, dim = plan.heads // plan.group_size, gradient.shape[3]
    rows = plan.batch * plan.length * kv_heads
    out = buffer(plan.batch, plan.length, kv_heads, dim, like=gradient, dtype=gradient.dtype)
    kernels.sum_heads[launch_grid("ssd", cdiv(rows, SUM_ROWS))](
        gradient, out, rows, dim,
        GROUP=plan.group_size, BLOCK_R=SUM_ROWS, BLOCK_D=block_size(dim), num_warps=SUM_WARPS,
    )  # fmt: skip
    return out
