"""Triton kernels that only the scan's backward pass needs: decay gradients, sums over head groups.

`kernels.py` has the legend and the layout of the decays. `backward.py` launches these.
"""

import triton
import triton.language as tl

from mmmamba_cli.ops.ssd.kernels import NOT_SPECIALIZED, load_rows, token_mask


@triton.jit(do_not_specialize=["num_rows"])
def sum_heads(
    gradient_ptr, out_ptr, num_rows, dim,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum gradients (rows, GROUP, dim) over the query heads of each group: (rows, dim)."""
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    keep = (r < num_rows) & (d < dim)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for head in tl.static_range(GROUP):
        at = gradient_ptr + (r * GROUP + head) * dim + d
        total += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + r * dim + d, total.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def pairs_of_chunk(
    x_ptr, B_ptr, C_ptr, dy_ptr, segment_ptr, step, high, low,
    start, t, real, length, x_t, B_t, C_t, dy_t,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a (Q,) from pairs of tokens within a chunk, in fp64, and the sum of x dy."""
    dp, dn = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    C = load_rows(C_ptr, start, t, real, dn, C_t, N, DTYPE)
    B = load_rows(B_ptr, start, t, real, dn, B_t, N, DTYPE)
    pairs = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    dy = load_rows(dy_ptr, start, t, real, dp, dy_t, P, DTYPE)
    x = load_rows(x_ptr, start, t, real, dp, x_t, P, DTYPE)
    products = tl.dot(dy, tl.trans(x), input_precision=PRECISION)
    skip = tl.sum(tl.where(t[:, None] == t[None, :], products, 0.0))
    log_decay = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    allowed = t[:, None] > t[None, :]
    if HAS_SEGMENTS:
        segment = tl.load(segment_ptr + tl.minimum(start + t, length - 1))
        allowed = allowed & (segment[:, None] == segment[None, :])
    pairs = tl.where(allowed, pairs * products * tl.exp(log_decay) * step[None, :], 0.0)
    # fp64, because these sums nearly cancel for a token between strong decays.
    pairs = pairs.to(tl.float64)
    return tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0), skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def decay_gradients(
    dt_ptr, A_ptr, bias_ptr, x_ptr, B_ptr, C_ptr, dy_ptr, mask_ptr, segment_ptr,
    step_ptr, high_ptr, low_ptr, chunk_decay_ptr, read_ptr, written_ptr, direct_ptr, product_ptr,
    pair_sum_ptr, skip_ptr, ddt_ptr, sums_ptr,
    length, heads, padded, num_spans, per_span, blocks, read_tiles, written_tiles, pair_tiles,
    dt_b, dt_t, dt_h, x_b, x_t, x_h, B_b, B_t, B_h, C_b, C_t, C_h, dy_b, dy_t, dy_h,
    GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, Q: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, ONE_CHUNK: tl.constexpr, MIN_DECAY: tl.constexpr,
    HAS_PAIRS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of dt (B, T, H) and, summed over each chunk, of A, dt_bias and D.

    The latter are `sums` (3, B, chunks, H).

    The gradient of the log decay of token k is the sum of all paths from tokens before k to token k
    or later, in four terms: pairs within the chunk, reads of the chunk's initial state by tokens
    from k on (`read`), writes to its final state by tokens before k (`written`), and the flow from
    its initial to its final state (`passing`). Separate sums avoid cancellation. With HAS_PAIRS,
    `span_outputs` has computed the pairs, else this kernel does.
    """
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    chunks = padded // Q
    start = chunk * Q
    t = tl.arange(0, Q)
    row_head = row * heads + head
    at = row_head * padded + start + t
    tile_stride = tl.num_programs(2) * heads * padded
    real = token_mask(mask_ptr, row, start + t, length, HAS_MASK)

    begins = start + t < 0
    if HAS_SEGMENTS:
        of_row = segment_ptr + row * length
        now = tl.minimum(start + t, length - 1)
        begins = tl.load(of_row + now) != tl.load(of_row + tl.maximum(now - 1, 0))
    step = tl.load(step_ptr + at)
    if HAS_PAIRS:
        pair_sum = tl.zeros((Q,), tl.float64)
        for tile in range(pair_tiles):
            pair_sum += tl.load(pair_sum_ptr + tile * tile_stride + at)
            pair_sum -= tl.load(pair_sum_ptr + (pair_tiles + tile) * tile_stride + at)
        skip = tl.load(skip_ptr + row_head * chunks + chunk)
    else:
        pair_sum, skip = pairs_of_chunk(
            x_ptr + row * x_b + head // GROUP * x_h, B_ptr + row * B_b + head // GROUP * B_h,
            C_ptr + row * C_b + head * C_h, dy_ptr + row * dy_b + head * dy_h,
            segment_ptr + row * length, step, tl.load(high_ptr + at), tl.load(low_ptr + at),
            start, t, real, length, x_t, B_t, C_t, dy_t,
            P, N, BLOCK_P, BLOCK_N, HAS_SEGMENTS, DTYPE, PRECISION,
        )  # fmt: skip

    # Start with the flow through the end of the span and step back to the end of this chunk. For
    # spans of ONE_CHUNK, `product` is the flow through the chunk itself.
    span = chunk // per_span
    of_span = (row * num_spans + span) * heads + head
    block = tl.arange(0, BLOCKS)
    parts = tl.load(product_ptr + of_span * blocks + block, mask=block < blocks, other=0.0)
    flow = tl.sum(parts, axis=0)
    last = tl.minimum((span + 1) * per_span, chunks) - 1
    read = tl.zeros((Q,), tl.float32)
    written = tl.zeros((Q,), tl.float32)
    passing = 0.0
    for i in range(last - chunk + 1):
        later = last - i
        at_later = row_head * padded + later * Q + t
        read, written = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)
        for tile in range(read_tiles):
            read += tl.load(read_ptr + tile * tile_stride + at_later)
        for tile in range(written_tiles):
            written += tl.load(written_ptr + tile * tile_stride + at_later)
        # With a strong decay the difference is only rounding error.
        decay = tl.load(chunk_decay_ptr + row_head * chunks + later)
        passing = flow
        if not ONE_CHUNK:
            passing = tl.where(decay < MIN_DECAY, 0.0, flow - tl.sum(written, axis=0))
        flow = passing + tl.sum(read, axis=0)
    direct = tl.zeros((Q,), tl.float32)
    for tile in range(written_tiles):
        direct += tl.load(direct_ptr + tile * tile_stride + at)

    pair_sum += read.to(tl.float64)
    before = tl.cumsum(written, axis=0) - written
    carried = tl.cumsum(pair_sum, axis=0, reverse=True).to(tl.float32) + before + passing
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
