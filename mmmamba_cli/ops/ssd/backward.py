"""Launches of the scan's backward pass that the forward pass has no use for.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from mmmamba_cli.ops.ssd import backward_kernels as kernels
from mmmamba_cli.ops.ssd.launch_config import Sizes, Steps
from mmmamba_cli.ops.triton_utils import block, buffer, either, launch_grid

# A decay below what fp32 leaves of the products beside it counts as none, in a gradient only.
LEAST_DECAY = 2.0**-20


class Tokens(NamedTuple):
    """x (B, T, K, P), B (B, T, K, N), C (B, T, H, N) and the gradient dy (B, T, H, P)."""

    x: Tensor
    B: Tensor
    C: Tensor
    dy: Tensor

    @property
    def strides(self) -> list[int]:
        """Of batch, time and head; numbers of a row lie side by side."""
        return [stride for tensor in self for stride in tensor.stride()[:3]]


class Dots(NamedTuple):
    """What tokens `got` from states (by tiles of N), `gave` to them and gave in all, `direct`.

    (tiles, B, H, padded T) each; the last two by tiles of P.
    """

    got: Tensor
    gave: Tensor
    direct: Tensor

    @classmethod
    def empty(cls, sizes: Sizes, like: Tensor) -> Dots:
        shape = (sizes.batch, sizes.heads, sizes.padded)
        tile = sizes.tuning.backward.tile
        got = triton.cdiv(sizes.N, min(tile, block(sizes.N)))
        gave = triton.cdiv(sizes.P, min(tile, block(sizes.P)))
        return cls(*(buffer(tiles, *shape, like=like) for tiles in (got, gave, gave)))


class Pairs(NamedTuple):
    """What pairs within chunks put on decays, and x dy summed over each chunk, (B, H, chunks).

    `change` is (2, tiles of N, B, H, padded T): the first of two is to be added, the second taken
    away.
    """

    change: Tensor
    skip: Tensor

    @classmethod
    def empty(cls, sizes: Sizes, like: Tensor) -> Pairs | None:
        """Memory for them; None where `decay_gradients` finds them itself."""
        if not sizes.paired:
            return None
        tiles = triton.cdiv(sizes.N, min(sizes.tuning.backward.tile, block(sizes.N)))
        shape = (2, tiles, sizes.batch, sizes.heads, sizes.padded)
        skip = buffer(sizes.batch, sizes.heads, sizes.chunks, like=like)
        return cls(buffer(*shape, like=like), skip)


def decay_gradients(
    sizes: Sizes,
    steps_of: tuple[Tensor, Tensor, Tensor | None],
    tokens: Tokens,
    steps: Steps,
    real: Tensor | None,
    segments: Tensor | None,
    dots: Dots,
    pairs: Pairs | None,
    products: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of dt, A, dt_bias and D; the last three in fp32."""
    dt, A, dt_bias = steps_of
    ddt = buffer(*dt.shape, like=dt, dtype=dt.dtype)
    sums = buffer(3, sizes.batch, sizes.chunks, sizes.heads, like=dt)
    blocks = products.shape[-1]
    kernels.decay_gradients[launch_grid("ssd", sizes.chunks, sizes.heads, sizes.batch)](
        dt, A.contiguous(), either(dt_bias, A), *tokens, either(real, A), either(segments, A),
        steps.step, steps.high, steps.low, steps.through, *dots, products,
        *((products, products) if pairs is None else pairs), ddt, sums,
        sizes.length, sizes.heads, sizes.padded, sizes.spans, sizes.per_span, blocks,
        dots.got.shape[0], dots.gave.shape[0], 0 if pairs is None else pairs.change.shape[1],
        *dt.stride(), *tokens.strides,
        SHARE=sizes.share, P=sizes.P, N=sizes.N, BLOCK_P=block(sizes.P), BLOCK_N=block(sizes.N),
        BLOCKS=block(blocks, 1), Q=sizes.tuning.chunk, SOFTPLUS=softplus,
        HAS_BIAS=dt_bias is not None, HAS_MASK=real is not None,
        HAS_SEGMENTS=segments is not None, SINGLE=sizes.per_span == 1, LEAST=LEAST_DECAY,
        PAIRED=pairs is not None, DTYPE=sizes.dtype,
        PRECISION="tf32x3", num_warps=4, num_stages=1,
    )  # fmt: skip
    dA, dbias, dD = sums.sum((1, 2)).unbind(0)
    return ddt, dA, dbias, dD


# Rows of a program of `sum_heads`, for heads of 128.
ROWS, ROWS_WARPS = 16, 4


def of_kv_heads(gradient: Tensor, sizes: Sizes) -> Tensor:
    """(B, T, H, dim) of the query heads, contiguous, summed to the key/value heads they share."""
    if sizes.share == 1:
        return gradient
    kv_heads, dim = sizes.heads // sizes.share, gradient.shape[3]
    rows = sizes.batch * sizes.length * kv_heads
    out = buffer(sizes.batch, sizes.length, kv_heads, dim, like=gradient, dtype=gradient.dtype)
    kernels.sum_heads[launch_grid("ssd", triton.cdiv(rows, ROWS))](
        gradient, out, rows, dim,
        SHARE=sizes.share, BLOCK_R=ROWS, BLOCK_D=block(dim), num_warps=ROWS_WARPS,
    )  # fmt: skip
    return out
