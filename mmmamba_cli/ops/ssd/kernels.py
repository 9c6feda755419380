"""Triton kernels of the scan and of its gradient; `fused.py` launches them.

Legend: B batch, T tokens, H query heads, P value dim, N state dim, Q tokens of a chunk, S spans of
several chunks each. The scan is linear attention with decay,

    out_i = sum_{j <= i} exp(a_i - a_j) (q_i . k_j) v_j + exp(a_i) q_i state

(Mamba-2, arXiv 2405.21060, section 6), and so are its gradients: with time running backwards for
those of x and B, and with other tensors as q, k and v. One kernel, `span_outputs`, does all four.
A program walks through the chunks of one span with the state in registers, so that no state of a
chunk is ever written to memory; `span_states` and `pass_states` find the state a span begins with.

Vectors over time are (B, H, padded T) in fp32, filled up to whole chunks with step size 0. The sum
a of log decays within a chunk comes as two floats, because the difference of two large sums keeps
few digits.
"""

import triton
import triton.language as tl

from mmmamba_cli.ops.triton_utils import place_in_grid

# Numbers that differ from call to call: a kernel for each kind of them would have to be compiled.
VARYING = ["length", "num_spans", "per_span"]


@triton.jit
def softplus(z):
    """log(1 + e^z); a series where 1 + e^-|z| would lose the digits of the second part."""
    u = tl.exp(-tl.abs(z))
    series = u * (1.0 - u * (0.5 - u * (1.0 / 3.0 - u * 0.25)))
    return tl.maximum(z, 0.0) + tl.where(u < 0.015625, series, tl.log(1.0 + u))


@triton.jit
def exponential(x, NATIVE: tl.constexpr):
    """e^x as `tl.exp` has it, but 0 where it would be denormal, which costs four instructions."""
    if NATIVE:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=r,r", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        y = tl.exp(x)
    return y


@triton.jit
def rounded_to(x, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """x with the digits of DTYPE, in fp32; two at once, where one by one is slow."""
    if NATIVE and tl.bfloat16 == DTYPE:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 both;
            cvt.rn.bf16x2.f32 both, $3, $2;
            shl.b32 $0, both, 16;
            and.b32 $1, both, 0xffff0000;
            }""",
            "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = x.to(DTYPE).to(tl.float32)
    return y


@triton.jit
def real_tokens(mask_ptr, row, t, length, HAS_MASK: tl.constexpr):
    """Whether each t is a token at all, and not padding."""
    real = t < length
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + row * length + t, mask=real, other=0) != 0)
    return real


@triton.jit
def rows_of(ptr, start, t, real, d, stride_t, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `start + t` of one head as a (Q, block) tile, zeros where there is nothing."""
    base = ptr + start.to(tl.int64) * stride_t
    keep = real[:, None] & (d < DIM)[None, :]
    return tl.load(base + t[:, None] * stride_t + d[None, :], mask=keep, other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=VARYING)
def prepare(
    dt_ptr, A_ptr, bias_ptr, mask_ptr, segment_ptr,
    step_ptr, high_ptr, low_ptr, from_start_ptr, to_end_ptr, through_ptr,
    length, heads, padded, dt_b, dt_t, dt_h,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Step sizes and decays of one chunk: everything that depends on dt, mask and packing."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = chunk * Q + tl.arange(0, Q)
    h = (tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    of_head = h < heads
    real = real_tokens(mask_ptr, row, t, length, HAS_MASK)
    keep = real[:, None] & of_head[None, :]
    at = dt_ptr + row * dt_b + t.to(tl.int64)[:, None] * dt_t + h[None, :] * dt_h
    step = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr + h, mask=of_head, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(keep, step, 0.0)
    rate = tl.load(A_ptr + h, mask=of_head, other=0.0).to(tl.float32)
    passed = (step * rate[None, :]).to(tl.float64)
    total = tl.sum(passed, axis=0)
    sums = tl.cumsum(passed, axis=0)
    high = sums.to(tl.float32)
    low = (sums - high.to(tl.float64)).to(tl.float32)
    from_start = tl.exp(high)
    to_end = tl.exp((total[None, :] - sums).to(tl.float32))
    through = tl.exp(total.to(tl.float32))
    if HAS_SEGMENTS:
        # Nothing passes from one packed sequence into the next; the first state is sequence 0's.
        of_row = segment_ptr + row * length
        segment = tl.load(of_row + tl.minimum(t, length - 1))
        before = tl.load(of_row + tl.maximum(chunk * Q - 1, 0))
        before = tl.where(chunk == 0, 0, before)
        last = tl.load(of_row + tl.minimum(chunk * Q + Q - 1, length - 1))
        from_start = tl.where((segment == before)[:, None], from_start, 0.0)
        to_end = tl.where((segment == last)[:, None], to_end, 0.0)
        through = tl.where(before == last, through, 0.0)
    of_heads = row * heads + h
    out = of_heads[None, :] * padded + t[:, None]
    stored = (t < padded)[:, None] & of_head[None, :]
    tl.store(step_ptr + out, step, mask=stored)
    tl.store(high_ptr + out, high, mask=stored)
    tl.store(low_ptr + out, low, mask=stored)
    tl.store(from_start_ptr + out, from_start, mask=stored)
    tl.store(to_end_ptr + out, to_end, mask=stored)
    tl.store(through_ptr + of_heads * (padded // Q) + chunk, through, mask=of_head)


@triton.jit(do_not_specialize=VARYING)
def span_states(
    k_ptr, v_ptr, mask_ptr, step_ptr, weight_ptr, through_ptr, state_ptr, decay_ptr,
    length, heads, padded, num_spans, per_span,
    k_b, k_t, k_h, v_b, v_t, v_h, state_k, state_v,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, Q: tl.constexpr, REVERSE: tl.constexpr,
    HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """What the tokens of a span leave in the state at its end, and its decay.

    In reverse, at its beginning. `weight` is each token's decay to that end of its chunk.
    """
    tiles = tl.cdiv(V_DIM, BLOCK_V)
    of_span, span = place_in_grid(tiles * heads, FOLDED)
    tile, head = of_span % tiles, (of_span // tiles).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    chunks = padded // Q
    first = span * per_span
    count = tl.minimum(per_span, chunks - first)
    t = tl.arange(0, Q)
    dk = tl.arange(0, BLOCK_K)
    dv = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    of_head = row * heads + head
    k_ptr += row * k_b + (head // K_SHARE) * k_h
    v_ptr += row * v_b + (head // V_SHARE) * v_h
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    decay = 1.0
    for number in range(count):
        chunk = first + number
        if REVERSE:
            chunk = first + count - 1 - number
        start = chunk * Q
        real = real_tokens(mask_ptr, row, start + t, length, HAS_MASK)
        k = rows_of(k_ptr, start, t, real, dk, k_t, K_DIM, DTYPE)
        v = rows_of(v_ptr, start, t, real, dv, v_t, V_DIM, DTYPE)
        at = of_head * padded + start + t
        weight = tl.load(weight_ptr + at)
        if not REVERSE:
            weight *= tl.load(step_ptr + at)
        through = tl.load(through_ptr + of_head * chunks + chunk)
        # x forwards and C in reverse, as in `span_outputs`.
        if REVERSE:
            k = (k * weight[:, None]).to(DTYPE)
        else:
            v = (v * weight[:, None]).to(DTYPE)
        state = tl.dot(tl.trans(k), v, state * through, input_precision=PRECISION)
        decay *= through
    place = (row * num_spans + span) * heads + head
    out = state_ptr + place * K_DIM * V_DIM + dk[:, None] * state_k + dv[None, :] * state_v
    tl.store(out, state, mask=(dk < K_DIM)[:, None] & (dv < V_DIM)[None, :])
    if tile == 0:
        tl.store(decay_ptr + place, decay)


@triton.jit(do_not_specialize=VARYING)
def pass_states(
    state_ptr, decay_ptr, first_ptr, last_ptr, entering_ptr, final_ptr, product_ptr,
    heads, num_spans, size, blocks,
    HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn what each span adds into the state it begins with, in place; the last goes to `last`.

    In reverse, `state` are gradients: each span's is turned into the one at its end, and its
    product with the state there, `entering` of the span behind or `final`, is left in `product`;
    with SINGLE, that with what is left at the end of the state the span began with.
    """
    block, of_head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    row, head = of_head // heads, of_head % heads
    e = block * BLOCK + tl.arange(0, BLOCK)
    keep = e < size
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + of_head * size + e, mask=keep, other=0.0).to(tl.float32)
    other = state
    if REVERSE:
        other = tl.load(final_ptr + of_head * size + e, mask=keep, other=0.0)
    # Spans differ in place: those behind are fetched while one is worked on.
    for number in tl.range(num_spans, num_stages=4):
        span = number
        if REVERSE:
            span = num_spans - 1 - number
        place = (row * num_spans + span) * heads + head
        at = place * size + e
        added = tl.load(state_ptr + at, mask=keep, other=0.0)
        decay = tl.load(decay_ptr + place)
        tl.store(state_ptr + at, state, mask=keep)
        if REVERSE:
            began = tl.load(entering_ptr + at, mask=keep, other=0.0)
            if SINGLE:
                other = began * decay
            tl.store(product_ptr + place * blocks + block, tl.sum(state * other, axis=0))
            other = began
        state = state * decay + added
    tl.store(last_ptr + of_head * size + e, state, mask=keep)


@triton.jit(do_not_specialize=VARYING)
def span_outputs(
    q_ptr, k_ptr, v_ptr, own_ptr, mask_ptr, segment_ptr,
    step_ptr, high_ptr, low_ptr, from_start_ptr, to_end_ptr, through_ptr,
    state_ptr, D_ptr, out_ptr, inter_ptr, whole_ptr, change_ptr, skip_ptr,
    length, heads, padded, num_spans, per_span,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, own_b, own_t, own_h,
    state_k, state_v,
    Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, OWN_SHARE: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    Q: tl.constexpr, REVERSE: tl.constexpr, WEIGH_K: tl.constexpr, DOTS: tl.constexpr,
    PAIRS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Decayed attention of one span, (B, T, H, V_DIM), from the state it begins with.

    Forwards a key's step size weighs what it gives; in reverse, the step size of the token itself
    weighs what it gets. DOTS 1 leaves the product of each token's `own` row with what came from the
    state, DOTS 2 that times its step size, and that with all it gets before its step size, skip
    left out: (tile, B, H, padded T) each. `decay_gradients` takes differences of sums of the first,
    so each factor in them is rounded as in the states they add up to, and no state is rounded.
    PAIRS, in reverse with x as q and `own` and v those of B and C, leaves this tile's part of what
    pairs of tokens within a chunk put on the decays, (2, tile, B, H, padded T): on those who get,
    and on those who give; and the sum of x dy in `skip` (B, H, chunks).
    """
    tiles = tl.cdiv(V_DIM, BLOCK_V)
    of_span, span = place_in_grid(tiles * heads, FOLDED)
    tile, head = of_span % tiles, (of_span // tiles).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    chunks = padded // Q
    first = span * per_span
    count = tl.minimum(per_span, chunks - first)
    t = tl.arange(0, Q)
    dk = tl.arange(0, BLOCK_K)
    dv = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    of_head = row * heads + head
    q_ptr += row * q_b + (head // Q_SHARE) * q_h
    k_ptr += row * k_b + (head // K_SHARE) * k_h
    v_ptr += row * v_b + (head // V_SHARE) * v_h
    own_ptr += row * own_b + (head // OWN_SHARE) * own_h
    out_ptr += row * length * heads * V_DIM + head * V_DIM
    in_state = (dk < K_DIM)[:, None] & (dv < V_DIM)[None, :]
    place = (row * num_spans + span) * heads + head
    at_state = state_ptr + place * K_DIM * V_DIM + dk[:, None] * state_k + dv[None, :] * state_v
    state = tl.load(at_state, mask=in_state, other=0.0)
    for number in range(count):
        chunk = first + number
        if REVERSE:
            chunk = first + count - 1 - number
        start = chunk * Q
        real = real_tokens(mask_ptr, row, start + t, length, HAS_MASK)
        q = rows_of(q_ptr, start, t, real, dk, q_t, K_DIM, DTYPE)
        k = rows_of(k_ptr, start, t, real, dk, k_t, K_DIM, DTYPE)
        v = rows_of(v_ptr, start, t, real, dv, v_t, V_DIM, DTYPE)
        at = of_head * padded + start + t
        step, high, low = tl.load(step_ptr + at), tl.load(high_ptr + at), tl.load(low_ptr + at)
        from_start, to_end = tl.load(from_start_ptr + at), tl.load(to_end_ptr + at)
        through = tl.load(through_ptr + of_head * chunks + chunk)

        if REVERSE:
            reach, leave = to_end, from_start
        else:
            reach, leave = from_start, to_end * step
        if DOTS > 0:
            # Asked for ahead of what it is wanted with.
            own = rows_of(own_ptr, start, t, real, dv, own_t, V_DIM, tl.float32)
        rounded = state.to(DTYPE)
        inter = tl.dot(q, rounded, input_precision=PRECISION)
        if DOTS > 0 and tl.bfloat16 == DTYPE:
            inter = tl.dot(q, (state - rounded.to(tl.float32)).to(DTYPE), inter)
        if DOTS > 0:
            of_tile = tile * tl.num_programs(2) * heads * padded + at
            if REVERSE:
                weighed = rounded_to(own * (to_end * step)[:, None], DTYPE, NATIVE)
            else:
                weighed = rounded_to(own * from_start[:, None], DTYPE, NATIVE)
            tl.store(inter_ptr + of_tile, tl.sum(weighed * inter, axis=1))
        inter *= reach[:, None]
        # Before the scores: a program that held k and v until they are done would run out of
        # registers.
        if WEIGH_K:
            left_k, left_v = (k * leave[:, None]).to(DTYPE), v
        else:
            left_k, left_v = k, (v * leave[:, None]).to(DTYPE)
        state = tl.dot(tl.trans(left_k), left_v, state * through, input_precision=PRECISION)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        passed = high[:, None] - high[None, :]
        if tl.float32 == DTYPE:
            # Digits that 16-bit scores do not have.
            passed += low[:, None] - low[None, :]
        if PAIRS:
            skip = tl.sum(tl.where(t[:, None] == t[None, :], scores, 0.0), axis=1)
            if tile == 0:
                tl.store(skip_ptr + of_head * chunks + chunk, tl.sum(skip, axis=0))
        if REVERSE:
            allowed = t[:, None] <= t[None, :]
            passed = -passed
        else:
            allowed = t[:, None] >= t[None, :]
            scores *= step[None, :]
        if HAS_SEGMENTS:
            at_t = tl.minimum(start + t, length - 1)
            segment = tl.load(segment_ptr + row * length + at_t)
            allowed = allowed & (segment[:, None] == segment[None, :])
        scores = tl.where(allowed, scores * exponential(passed, NATIVE), 0.0)

        if PAIRS:
            own = rows_of(own_ptr, start, t, real, dv, own_t, V_DIM, DTYPE)
            pairs = tl.dot(own, tl.trans(v), input_precision=PRECISION) * scores * step[:, None]
            # What a token gives itself passes no decay.
            pairs = tl.where(t[:, None] == t[None, :], 0.0, pairs)
            of_kind = tl.num_programs(2) * heads * padded
            at_pairs = change_ptr + tile * of_kind + at
            tl.store(at_pairs, tl.sum(pairs, axis=0))
            tl.store(at_pairs + tiles * of_kind, tl.sum(pairs, axis=1))
        out = tl.dot(scores.to(DTYPE), v, inter, input_precision=PRECISION)
        if DOTS == 2:
            tl.store(whole_ptr + of_tile, tl.sum(own * out, axis=1))
        if REVERSE:
            out *= step[:, None]
        if HAS_D:
            out += tl.load(D_ptr + head).to(tl.float32) * v.to(tl.float32)
        at_out = out_ptr + start.to(tl.int64) * heads * V_DIM
        at_out += t[:, None] * heads * V_DIM + dv[None, :]
        stored = (start + t < length)[:, None] & (dv < V_DIM)[None, :]
        tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=stored)
