"""Triton kernels of one decoding step of a mixer; `fused.py` launches them.

Legend: B batch, H query heads, K key/value heads, P value dim, N state dim, Ch channels, W taps.
"""

import triton
import triton.language as tl

from mmmamba_cli.ops.ssd.kernels import softplus
from mmmamba_cli.ops.triton_utils import call_next, wait_for_inputs


@triton.jit
def remembered(
    ring_ptr, weight_ptr, bias_ptr, ch, keep, position, W: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """What bias and the tokens before bring to the convolution at some channels, fp32.

    And the token's own weight there.
    """
    own = tl.load(weight_ptr + ch * W + W - 1, mask=keep, other=0.0).to(tl.float32)
    y = tl.zeros_like(own)
    if HAS_BIAS:
        y += tl.load(bias_ptr + ch, mask=keep, other=0.0).to(tl.float32)
    for past in tl.static_range(W - 1):
        # The slot after the token's own is the oldest.
        old = tl.load(ring_ptr + ch * W + (position + 1 + past) % W, mask=keep, other=0.0)
        weight = tl.load(weight_ptr + ch * W + past, mask=keep, other=0.0)
        y += old.to(tl.float32) * weight.to(tl.float32)
    return y, own


@triton.jit
def convolved(x_ptr, ring_ptr, before, own, ch, keep, writes, position, W: tl.constexpr):
    """SiLU of the convolution, what is `remembered` and the token, rounded to the input's dtype.

    Fills the token's slot. Heads that share keys and values compute them again each; `writes` says
    who stores them. Nobody reads the slot that is written.
    """
    x = tl.load(x_ptr + ch, mask=keep, other=0.0)
    y = before + x.to(tl.float32) * own
    slot = ring_ptr + ch * W + position % W
    tl.store(slot, x.to(ring_ptr.dtype.element_ty), mask=keep & writes)
    return (y * tl.sigmoid(y)).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def mixer_step(
    x_ptr, dt_ptr, ring_ptr, state_ptr, position_ptr, out_ptr,
    weight_ptr, bias_ptr, A_ptr, dt_bias_ptr, D_ptr,
    heads, channels, x_b, dt_b,
    SHARE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some values of one head of one row: their part of the state is read once, written once.

    SETTLED: all but x and dt was there before the launch before began, and is read while that one
    still runs. Nothing is written until it has ended.
    """
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    shared, kv_heads = head // SHARE, heads // SHARE
    p, n = part * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    of_p, of_n = p < P, n < N
    state_at = state_ptr + (row * heads + head) * P * N + p[:, None] * N + n[None, :]
    keep = of_p[:, None] & of_n[None, :]
    x_ptr += row * x_b
    ring_ptr += row * channels * W
    if not SETTLED:
        wait_for_inputs(OVERLAP)
    # Asked for first: it takes the longest.
    state = tl.load(state_at, mask=keep, other=0.0)
    position = (tl.load(position_ptr) % W).to(tl.int32)
    of_v, of_k = shared * P + p, kv_heads * P + shared * N + n
    of_q = kv_heads * (P + N) + head * N + n
    v, own_v = remembered(ring_ptr, weight_ptr, bias_ptr, of_v, of_p, position, W, HAS_BIAS)
    k, own_k = remembered(ring_ptr, weight_ptr, bias_ptr, of_k, of_n, position, W, HAS_BIAS)
    q, own_q = remembered(ring_ptr, weight_ptr, bias_ptr, of_q, of_n, position, W, HAS_BIAS)
    rate = tl.load(A_ptr + head).to(tl.float32)
    if SETTLED:
        wait_for_inputs(OVERLAP)
    call_next(OVERLAP)
    for_all, first = head % SHARE == 0, part == 0
    v = convolved(x_ptr, ring_ptr, v, own_v, of_v, of_p, for_all, position, W)
    k = convolved(x_ptr, ring_ptr, k, own_k, of_k, of_n, for_all & first, position, W)
    q = convolved(x_ptr, ring_ptr, q, own_q, of_q, of_n, first, position, W)
    step = tl.load(dt_ptr + row * dt_b + head).to(tl.float32)
    if HAS_DT_BIAS:
        step += tl.load(dt_bias_ptr + head).to(tl.float32)
    step = softplus(step)
    decay = tl.exp(step * rate)
    state = state * decay + (step * v)[:, None] * k[None, :]
    tl.store(state_at, state, mask=keep)
    y = tl.sum(state * q[None, :], axis=1)
    if HAS_D:
        y += tl.load(D_ptr + head).to(tl.float32) * v
    out = out_ptr + (row * heads + head) * P + p
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=of_p)


@triton.jit
def rotated(x_ptr, cos_ptr, sin_ptr, p, keep, P: tl.constexpr):
    """Numbers p of a vector of P, turned by their angles, fp32: the halves against each other."""
    HALF: tl.constexpr = P // 2
    second = p >= HALF
    x = tl.load(x_ptr + p, mask=keep, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + tl.where(second, p - HALF, p + HALF), mask=keep, other=0.0)
    other = other.to(tl.float32)
    cos = tl.load(cos_ptr + p, mask=keep, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + p, mask=keep, other=0.0).to(tl.float32)
    return x * cos + tl.where(second, other, -other) * sin


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, position_ptr, starts_ptr, cos_ptr, sin_ptr,
    part_ptr, top_ptr, sum_ptr,
    q_b, k_b, v_b, keys_b, keys_h, keys_s, values_b, values_h, values_s, angle_b, scale,
    SHARE: tl.constexpr, P: tl.constexpr, HAS_STARTS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The query heads of one key/value head over one share of the columns before the token.

    The token's own column goes from registers into the first share's sums, and into the cache:
    nobody reads it there. `part` (B, H, shares, P) are the sums of weighted values, `sum` those of
    weights (B, H, shares), both times 2 ** -top.
    """
    share, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    shares, kv_heads = tl.num_programs(0), tl.num_programs(1)
    g, p, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_S)
    of_g, of_p = g < SHARE, p < P
    keep = of_g[:, None] & of_p[None, :]
    cos_ptr += row * angle_b
    sin_ptr += row * angle_b
    keys_ptr += row * keys_b + head.to(tl.int64) * keys_h
    values_ptr += row * values_b + head.to(tl.int64) * values_h
    wait_for_inputs(OVERLAP)
    call_next(OVERLAP)
    position = tl.load(position_ptr).to(tl.int32)
    start = tl.load(starts_ptr + row).to(tl.int32) if HAS_STARTS else position * 0
    q = rotated(
        q_ptr + row * q_b + (head * SHARE + g)[:, None] * P, cos_ptr, sin_ptr, p[None, :], keep, P
    )
    q = q.to(DTYPE)
    k = rotated(k_ptr + row * k_b + head * P, cos_ptr, sin_ptr, p, of_p, P)
    k = k.to(keys_ptr.dtype.element_ty)
    v = tl.load(v_ptr + row * v_b + head * P + p, mask=of_p, other=0.0)
    v = v.to(values_ptr.dtype.element_ty)
    first = share == 0
    own = position.to(tl.int64)
    tl.store(keys_ptr + own * keys_s + p, k, mask=of_p & first)
    tl.store(values_ptr + own * values_s + p, v, mask=of_p & first)

    score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
    top = tl.where(first, score, -float("inf"))
    total = tl.where(first, tl.full((BLOCK_G,), 1.0, tl.float32), 0.0)
    sums = tl.where(first, v.to(tl.float32)[None, :], 0.0) + tl.zeros(
        (BLOCK_G, BLOCK_P), tl.float32
    )
    tiles = tl.cdiv(tl.cdiv(position - start, BLOCK_S), shares)
    low = start + share * tiles * BLOCK_S
    high = tl.minimum(low + tiles * BLOCK_S, position)
    for column in range(low, high, BLOCK_S):
        c = column + s
        at = c.to(tl.int64)
        inside = c < high
        mask = inside[:, None] & of_p[None, :]
        keys = tl.load(keys_ptr + at[:, None] * keys_s + p[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys).to(DTYPE), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.load(values_ptr + at[:, None] * values_s + p[None, :], mask=mask, other=0.0)
        product = tl.dot(weights.to(DTYPE), values.to(DTYPE), input_precision="ieee")
        sums = sums * shrink[:, None] + product
        top = higher
    at = ((row * kv_heads + head) * SHARE + g) * shares + share
    tl.store(top_ptr + at, top, mask=of_g)
    tl.store(sum_ptr + at, total, mask=of_g)
    tl.store(part_ptr + at[:, None] * P + p[None, :], sums, mask=keep)


@triton.jit
def combine(
    part_ptr, top_ptr, sum_ptr, out_ptr, shares,
    P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some numbers of one head's read-out from the shares of `attend`."""
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    of_c, of_p = c < shares, p < P
    wait_for_inputs(OVERLAP)
    call_next(OVERLAP)
    at = head * shares + c
    top = tl.load(top_ptr + at, mask=of_c, other=-float("inf"))
    total = tl.load(sum_ptr + at, mask=of_c, other=0.0)
    keep = of_c[:, None] & of_p[None, :]
    sums = tl.load(part_ptr + at[:, None] * P + p[None, :], mask=keep, other=0.0)
    # The first share is never empty, so that the highest is finite.
    weights = tl.exp2(top - tl.max(top, axis=0))
    y = tl.sum(sums * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
    tl.store(out_ptr + head * P + p, y.to(out_ptr.dtype.element_ty), mask=of_p)


@triton.jit
def largest(value, index, best, at):
    """The larger of two, and of equal ones that with the smaller index."""
    takes = (value > best) | ((value == best) & (index < at))
    return tl.where(takes, value, best), tl.where(takes, index, at)


@triton.jit(do_not_specialize=["size"])
def largest_of_parts(
    logits_ptr, unwanted_ptr, best_ptr, at_ptr, size, logits_b, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The largest wanted logit of every PARTS-th block, and its index: (B, PARTS) each."""
    part, row = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    wait_for_inputs(OVERLAP)
    call_next(OVERLAP)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    at = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(part * BLOCK, size, PARTS * BLOCK):
        index = start + tl.arange(0, BLOCK)
        keep = index < size
        keep = keep & (tl.load(unwanted_ptr + index, mask=keep, other=1) == 0)
        value = tl.load(
            logits_ptr + row.to(tl.int64) * logits_b + index, mask=keep, other=-float("inf")
        )
        best, at = largest(value.to(tl.float32), index, best, at)
    best, at = tl.reduce((best, at), 0, largest)
    tl.store(best_ptr + row * PARTS + part, best)
    tl.store(at_ptr + row * PARTS + part, at)


@triton.jit(do_not_specialize=["size"])
def largest_of_all(best_ptr, at_ptr, out_ptr, size, PARTS: tl.constexpr, OVERLAP: tl.constexpr):
    """The index of a row's largest, (B,); that of the last where nothing was wanted."""
    row = tl.program_id(0)
    wait_for_inputs(OVERLAP)
    call_next(OVERLAP)
    part = row * PARTS + tl.arange(0, PARTS)
    _, at = tl.reduce((tl.load(best_ptr + part), tl.load(at_ptr + part)), 0, largest)
    tl.store(out_ptr + row, tl.minimum(at, size - 1).to(tl.int64))
