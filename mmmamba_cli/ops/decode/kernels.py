"""Triton kernels of one decoding step of a mixer and of argmax; `fused.py` launches them.

Legend: B batch, H query heads, K key/value heads, P value dim, N state dim, Ch channels, W taps.
"""

import triton
import triton.language as tl

from mmmamba_cli.ops.ssd.kernels import softplus
from mmmamba_cli.ops.triton_utils import launch_dependents, wait_for_inputs


@triton.jit
def conv_history(
    ring_ptr, weight_ptr, bias_ptr, ch, keep, position, W: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Bias and previous tokens in the convolution at channels `ch`, and the newest tap; fp32."""
    own = tl.load(weight_ptr + ch * W + W - 1, mask=keep, other=0.0).to(tl.float32)
    y = tl.zeros_like(own)
    if HAS_BIAS:
        y += tl.load(bias_ptr + ch, mask=keep, other=0.0).to(tl.float32)
    for past in tl.static_range(W - 1):
        # The slot after the token's own holds the oldest input.
        old = tl.load(ring_ptr + ch * W + (position + 1 + past) % W, mask=keep, other=0.0)
        weight = tl.load(weight_ptr + ch * W + past, mask=keep, other=0.0)
        y += old.to(tl.float32) * weight.to(tl.float32)
    return y, own


@triton.jit
def conv_silu_step(x_ptr, ring_ptr, before, own, ch, keep, writes, position, W: tl.constexpr):
    """SiLU of the convolution (`conv_history` plus the token), rounded to the input's dtype.

    Stores the token into its slot, which no program reads, where `writes` is set: heads that share
    keys and values each compute them, but only one stores them.
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
    GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, INPUTS_READY: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_P values of one head of one row; their part of the state is read and written once.

    INPUTS_READY: everything but x and dt was written before the previous launch began, and is read
    while that launch runs. Nothing is written until it has ended.
    """
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    shared, kv_heads = head // GROUP, heads // GROUP
    p, n = part * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    state_at = state_ptr + (row * heads + head) * P * N + p[:, None] * N + n[None, :]
    keep = mask_p[:, None] & mask_n[None, :]
    x_ptr += row * x_b
    ring_ptr += row * channels * W
    if not INPUTS_READY:
        wait_for_inputs(USE_PDL)
    # The largest load comes first, to hide its latency.
    state = tl.load(state_at, mask=keep, other=0.0)
    position = (tl.load(position_ptr) % W).to(tl.int32)
    ch_v, ch_k = shared * P + p, kv_heads * P + shared * N + n
    ch_q = kv_heads * (P + N) + head * N + n
    v, w_v = conv_history(ring_ptr, weight_ptr, bias_ptr, ch_v, mask_p, position, W, HAS_BIAS)
    k, w_k = conv_history(ring_ptr, weight_ptr, bias_ptr, ch_k, mask_n, position, W, HAS_BIAS)
    q, w_q = conv_history(ring_ptr, weight_ptr, bias_ptr, ch_q, mask_n, position, W, HAS_BIAS)
    rate = tl.load(A_ptr + head).to(tl.float32)
    if INPUTS_READY:
        wait_for_inputs(USE_PDL)
    launch_dependents(USE_PDL)
    for_all, first = head % GROUP == 0, part == 0
    v = conv_silu_step(x_ptr, ring_ptr, v, w_v, ch_v, mask_p, for_all, position, W)
    k = conv_silu_step(x_ptr, ring_ptr, k, w_k, ch_k, mask_n, for_all & first, position, W)
    q = conv_silu_step(x_ptr, ring_ptr, q, w_q, ch_q, mask_n, first, position, W)
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
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask_p)


@triton.jit
def apply_rope(x_ptr, cos_ptr, sin_ptr, p, keep, P: tl.constexpr):
    """Elements p of a vector of P after RoPE with rotated halves, fp32."""
    HALF: tl.constexpr = P // 2
    second = p >= HALF
    x = tl.load(x_ptr + p, mask=keep, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + tl.where(second, p - HALF, p + HALF), mask=keep, other=0.0)
    other = other.to(tl.float32)
    cos = tl.load(cos_ptr + p, mask=keep, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + p, mask=keep, other=0.0).to(tl.float32)
    return x * cos + tl.where(second, other, -other) * sin


@triton.jit
def attention_split(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, position_ptr, starts_ptr, cos_ptr, sin_ptr,
    part_ptr, max_ptr, sum_ptr,
    q_b, k_b, v_b, keys_b, keys_h, keys_s, values_b, values_h, values_s, angle_b, scale,
    GROUP: tl.constexpr, P: tl.constexpr, HAS_STARTS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """The query heads of one key/value head over one split of the columns before the token.

    The first split adds the token's own column from registers and stores it into the cache, where
    no program reads it. Per split: `part` (B, H, splits, P) is the sum of weighted values and `sum`
    (B, H, splits) that of weights, both scaled by 2 ** -row_max, with `row_max` the largest score.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits, kv_heads = tl.num_programs(0), tl.num_programs(1)
    g, p, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_S)
    mask_g, mask_p = g < GROUP, p < P
    keep = mask_g[:, None] & mask_p[None, :]
    cos_ptr += row * angle_b
    sin_ptr += row * angle_b
    keys_ptr += row * keys_b + head.to(tl.int64) * keys_h
    values_ptr += row * values_b + head.to(tl.int64) * values_h
    wait_for_inputs(USE_PDL)
    launch_dependents(USE_PDL)
    position = tl.load(position_ptr).to(tl.int32)
    start = tl.load(starts_ptr + row).to(tl.int32) if HAS_STARTS else position * 0
    q = apply_rope(
        q_ptr + row * q_b + (head * GROUP + g)[:, None] * P, cos_ptr, sin_ptr, p[None, :], keep, P
    )
    q = q.to(DTYPE)
    k = apply_rope(k_ptr + row * k_b + head * P, cos_ptr, sin_ptr, p, mask_p, P)
    k = k.to(keys_ptr.dtype.element_ty)
    v = tl.load(v_ptr + row * v_b + head * P + p, mask=mask_p, other=0.0)
    v = v.to(values_ptr.dtype.element_ty)
    first = split == 0
    own = position.to(tl.int64)
    tl.store(keys_ptr + own * keys_s + p, k, mask=mask_p & first)
    tl.store(values_ptr + own * values_s + p, v, mask=mask_p & first)

    score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
    row_max = tl.where(first, score, -float("inf"))
    row_sum = tl.where(first, tl.full((BLOCK_G,), 1.0, tl.float32), 0.0)
    acc = tl.where(first, v.to(tl.float32)[None, :], 0.0) + tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    tiles = tl.cdiv(tl.cdiv(position - start, BLOCK_S), splits)
    low = start + split * tiles * BLOCK_S
    high = tl.minimum(low + tiles * BLOCK_S, position)
    for column in range(low, high, BLOCK_S):
        c = column + s
        at = c.to(tl.int64)
        inside = c < high
        mask = inside[:, None] & mask_p[None, :]
        keys = tl.load(keys_ptr + at[:, None] * keys_s + p[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys).to(DTYPE), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        values = tl.load(values_ptr + at[:, None] * values_s + p[None, :], mask=mask, other=0.0)
        product = tl.dot(weights.to(DTYPE), values.to(DTYPE), input_precision="ieee")
        acc = acc * rescale[:, None] + product
        row_max = new_max
    at = ((row * kv_heads + head) * GROUP + g) * splits + split
    tl.store(max_ptr + at, row_max, mask=mask_g)
    tl.store(sum_ptr + at, row_sum, mask=mask_g)
    tl.store(part_ptr + at[:, None] * P + p[None, :], acc, mask=keep)


@triton.jit
def merge_splits(
    part_ptr, max_ptr, sum_ptr, out_ptr, splits,
    P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of `attention_split` into BLOCK_P elements of one head's output."""
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_c, mask_p = c < splits, p < P
    wait_for_inputs(USE_PDL)
    launch_dependents(USE_PDL)
    at = head * splits + c
    row_max = tl.load(max_ptr + at, mask=mask_c, other=-float("inf"))
    row_sum = tl.load(sum_ptr + at, mask=mask_c, other=0.0)
    keep = mask_c[:, None] & mask_p[None, :]
    acc = tl.load(part_ptr + at[:, None] * P + p[None, :], mask=keep, other=0.0)
    # The first split is never empty, so the maximum is finite.
    weights = tl.exp2(row_max - tl.max(row_max, axis=0))
    y = tl.sum(acc * weights[:, None], axis=0) / tl.sum(row_sum * weights, axis=0)
    tl.store(out_ptr + head * P + p, y.to(out_ptr.dtype.element_ty), mask=mask_p)


@triton.jit
def argmax_pair(value, index, best, at):
    """The larger of two values with its index; of equal values the smaller index."""
    takes = (value > best) | ((value == best) & (index < at))
    return tl.where(takes, value, best), tl.where(takes, index, at)


@triton.jit(do_not_specialize=["size"])
def argmax_split(
    logits_ptr, suppressed_ptr, best_ptr, at_ptr, size, logits_b, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Largest logit that is not suppressed in every SPLITS-th block, and its index: (B, SPLITS)."""
    part, row = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    wait_for_inputs(USE_PDL)
    launch_dependents(USE_PDL)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    at = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(part * BLOCK, size, SPLITS * BLOCK):
        index = start + tl.arange(0, BLOCK)
        keep = index < size
        keep = keep & (tl.load(suppressed_ptr + index, mask=keep, other=1) == 0)
        value = tl.load(
            logits_ptr + row.to(tl.int64) * logits_b + index, mask=keep, other=-float("inf")
        )
        best, at = argmax_pair(value.to(tl.float32), index, best, at)
    best, at = tl.reduce((best, at), 0, argmax_pair)
    tl.store(best_ptr + row * SPLITS + part, best)
    tl.store(at_ptr + row * SPLITS + part, at)


@triton.jit(do_not_specialize=["size"])
def argmax_merge(best_ptr, at_ptr, out_ptr, size, SPLITS: tl.constexpr, USE_PDL: tl.constexpr):
    """Merge the splits of `argmax_split` into ids (B,); the last id where all are suppressed."""
    row = tl.program_id(0)
    wait_for_inputs(USE_PDL)
    launch_dependents(USE_PDL)
    part = row * SPLITS + tl.arange(0, SPLITS)
    _, at = tl.reduce((tl.load(best_ptr + part), tl.load(at_ptr + part)), 0, argmax_pair)
    tl.store(out_ptr + row, tl.minimum(at, size - 1).to(tl.int64))
