"""Triton kernels of the scan's gradient alone: of all that decays, and sums over shared heads.

Legend and layout of what they read: `kernels.py`. `backward.py` launches them.
"""

import triton
import triton.language as tl

from mmmamba_cli.ops.ssd.kernels import VARYING, real_tokens, rows_of


@triton.jit(do_not_specialize=["num_rows"])
def sum_heads(
    gradient_ptr, out_ptr, num_rows, dim,
    SHARE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients (rows, SHARE, dim) of query heads, summed to the head they share: (rows, dim)."""
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    keep = (r < num_rows) & (d < dim)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for head in tl.static_range(SHARE):
        at = gradient_ptr + (r * SHARE + head) * dim + d
        total += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + r * dim + d, total.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def pairs_of_chunk(
    x_ptr, B_ptr, C_ptr, dy_ptr, segment_ptr, step, high, low,
    start, t, real, length, x_t, B_t, C_t, dy_t,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What pairs of tokens within a chunk put on each decay, in fp64, and the sum of x dy."""
    dp, dn = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    C = rows_of(C_ptr, start, t, real, dn, C_t, N, DTYPE)
    B = rows_of(B_ptr, start, t, real, dn, B_t, N, DTYPE)
    pairs = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    dy = rows_of(dy_ptr, start, t, real, dp, dy_t, P, DTYPE)
    x = rows_of(x_ptr, start, t, real, dp, x_t, P, DTYPE)
    products = tl.dot(dy, tl.trans(x), input_precision=PRECISION)
    skip = tl.sum(tl.where(t[:, None] == t[None, :], products, 0.0))
    passed = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    allowed = t[:, None] > t[None, :]
    if HAS_SEGMENTS:
        segment = tl.load(segment_ptr + tl.minimum(start + t, length - 1))
        allowed = allowed & (segment[:, None] == segment[None, :])
    pairs = tl.where(allowed, pairs * products * tl.exp(passed) * step[None, :], 0.0)
    # A token between strong decays carries almost nothing of these sums.
    pairs = pairs.to(tl.float64)
    return tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0), skip


@triton.jit(do_not_specialize=VARYING)
def decay_gradients(
    dt_ptr, A_ptr, bias_ptr, x_ptr, B_ptr, C_ptr, dy_ptr, mask_ptr, segment_ptr,
    step_ptr, high_ptr, low_ptr, through_ptr, got_ptr, gave_ptr, direct_ptr, product_ptr,
    change_ptr, skip_ptr, ddt_ptr, sums_ptr,
    length, heads, padded, num_spans, per_span, blocks, got_tiles, gave_tiles, pair_tiles,
    dt_b, dt_t, dt_h, x_b, x_t, x_h, B_b, B_t, B_h, C_b, C_t, C_h, dy_b, dy_t, dy_h,
    SHARE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, Q: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, SINGLE: tl.constexpr, LEAST: tl.constexpr,
    PAIRED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of dt (B, T, H) and, summed over a chunk, of A, dt_bias and D.

    The log decay of token k carries whatever goes from before it to it or later: pairs within the
    chunk, what tokens from k on `got` from the state, what tokens before k `gave` to it, and what
    passes through the chunk. Each is summed by itself, so that little cancels. PAIRED says that
    `span_outputs` has left the pairs: what is added, and behind it what is taken away, by tiles.
    """
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    chunks = padded // Q
    start = chunk * Q
    t = tl.arange(0, Q)
    of_head = row * heads + head
    at = of_head * padded + start + t
    tile_stride = tl.num_programs(2) * heads * padded
    real = real_tokens(mask_ptr, row, start + t, length, HAS_MASK)

    begins = start + t < 0
    if HAS_SEGMENTS:
        of_row = segment_ptr + row * length
        now = tl.minimum(start + t, length - 1)
        begins = tl.load(of_row + now) != tl.load(of_row + tl.maximum(now - 1, 0))
    step = tl.load(step_ptr + at)
    if PAIRED:
        change = tl.zeros((Q,), tl.float64)
        for tile in range(pair_tiles):
            change += tl.load(change_ptr + tile * tile_stride + at)
            change -= tl.load(change_ptr + (pair_tiles + tile) * tile_stride + at)
        skip = tl.load(skip_ptr + of_head * chunks + chunk)
    else:
        change, skip = pairs_of_chunk(
            x_ptr + row * x_b + head // SHARE * x_h, B_ptr + row * B_b + head // SHARE * B_h,
            C_ptr + row * C_b + head * C_h, dy_ptr + row * dy_b + head * dy_h,
            segment_ptr + row * length, step, tl.load(high_ptr + at), tl.load(low_ptr + at),
            start, t, real, length, x_t, B_t, C_t, dy_t,
            P, N, BLOCK_P, BLOCK_N, HAS_SEGMENTS, DTYPE, PRECISION,
        )  # fmt: skip

    # What passes the end of the span, and from there back to the end of this chunk; of a span of
    # a SINGLE chunk, what passes through it.
    span = chunk // per_span
    of_span = (row * num_spans + span) * heads + head
    block = tl.arange(0, BLOCKS)
    parts = tl.load(product_ptr + of_span * blocks + block, mask=block < blocks, other=0.0)
    flow = tl.sum(parts, axis=0)
    last = tl.minimum((span + 1) * per_span, chunks) - 1
    got = tl.zeros((Q,), tl.float32)
    gave = tl.zeros((Q,), tl.float32)
    through = 0.0
    for number in range(last - chunk + 1):
        later = last - number
        at_later = of_head * padded + later * Q + t
        got, gave = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)
        for tile in range(got_tiles):
            got += tl.load(got_ptr + tile * tile_stride + at_later)
        for tile in range(gave_tiles):
            gave += tl.load(gave_ptr + tile * tile_stride + at_later)
        # Where hardly any state passes, what is left of the difference is rounding.
        decay = tl.load(through_ptr + of_head * chunks + later)
        through = flow
        if not SINGLE:
            through = tl.where(decay < LEAST, 0.0, flow - tl.sum(gave, axis=0))
        flow = through + tl.sum(got, axis=0)
    direct = tl.zeros((Q,), tl.float32)
    for tile in range(gave_tiles):
        direct += tl.load(direct_ptr + tile * tile_stride + at)

    change += got.to(tl.float64)
    before = tl.cumsum(gave, axis=0) - gave
    carried = tl.cumsum(change, axis=0, reverse=True).to(tl.float32) + before + through
    carried = tl.where(begins, 0.0, carried)
    ddt = carried * tl.load(A_ptr + head).to(tl.float32) + direct
    at_t = row * dt_b + (start + t).to(tl.int64) * dt_t + head * dt_h
    if SOFTPLUS:
        z = tl.load(dt_ptr + at_t, mask=real, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + head).to(tl.float32)
        ddt *= tl.sigmoid(z)
    ddt = tl.where(real, ddt, 0.0)
    out = ddt_ptr + (row * length + start + t) * heads + head
    tl.store(out, ddt.to(ddt_ptr.dtype.element_ty), mask=start + t < length)
    sums = sums_ptr + (row * chunks + chunk) * heads + head
    of_kind = tl.num_programs(2) * chunks * heads
    tl.store(sums, tl.sum(carried * step, axis=0))
    tl.store(sums + of_kind, tl.sum(ddt, axis=0))
    tl.store(sums + 2 * of_kind, skip)
