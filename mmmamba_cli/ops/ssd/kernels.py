"""Triton kernels of the scan and of its gradient; `fused.py` launches them.

Legend: B batch, T tokens, H query heads, P value dim, N state dim, Q tokens per chunk. A span is a
run of consecutive chunks. The scan is linear attention with decay,

    out_i = sum_{j <= i} exp(a_i - a_j) (q_i . k_j) v_j + exp(a_i) q_i state

(Mamba-2, arXiv 2405.21060, section 6), where a is the cumulative sum of the log decays dt A. Its
gradients have the same form: those of x and B with time reversed, that of C forwards, with other
tensors as q, k and v. One kernel, `span_outputs`, computes all four. A program processes the chunks
of one span in order with the state in registers, so states of single chunks are never written to
memory. `span_states` and `pass_states` compute the initial state of each span.

Decays are (B, H, padded T) in fp32, padded to whole chunks with step size 0:

    step         dt, after bias and softplus
    high + low   a, the sum of dt A from the start of the chunk to the token. Two floats, because
                 the difference of two large sums cancels most bits of one
    from_start   exp(a), the decay from the start of the chunk to the token
    to_end       the decay from the token to the end of the chunk
    chunk_decay  the decay of the whole chunk, (B, H, chunks)

Suffixes of strides: _b batch, _t token, _h head.
"""

import triton
import triton.language as tl

from mmmamba_cli.ops.triton_utils import grid_position

# Arguments that vary with the prompt length: specializing on them would recompile the kernels.
NOT_SPECIALIZED = ["length", "num_spans", "per_span"]


@triton.jit
def softplus(z):
    """log(1 + e^z), by a series where 1 + e^-|z| would round away bits of e^-|z|."""
    u = tl.exp(-tl.abs(z))
    series = u * (1.0 - u * (0.5 - u * (1.0 / 3.0 - u * 0.25)))
    return tl.maximum(z, 0.0) + tl.where(u < 0.015625, series, tl.log(1.0 + u))


@triton.jit
def exp_ftz(x, USE_PTX: tl.constexpr):
    """e^x with denormal results flushed to 0, which saves four instructions of `tl.exp`."""
    if USE_PTX:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=r,r", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        y = tl.exp(x)
    return y


@triton.jit
def round_to(x, DTYPE: tl.constexpr, USE_PTX: tl.constexpr):
    """x rounded to DTYPE, as fp32; bf16 by one PTX instruction for two elements."""
    if USE_PTX and tl.bfloat16 == DTYPE:
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
def token_mask(mask_ptr, row, t, length, HAS_MASK: tl.constexpr):
    """True where t is a token of the row and not padding."""
    real = t < length
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + row * length + t, mask=real, other=0) != 0)
    return real


@triton.jit
def load_rows(ptr, start, t, real, d, stride_t, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Load rows `start + t` of one head as a (Q, block) tile, 0 at padding and beyond DIM."""
    base = ptr + start.to(tl.int64) * stride_t
    keep = real[:, None] & (d < DIM)[None, :]
    return tl.load(base + t[:, None] * stride_t + d[None, :], mask=keep, other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def prepare_decays(
    dt_ptr, A_ptr, bias_ptr, mask_ptr, segment_ptr,
    step_ptr, high_ptr, low_ptr, from_start_ptr, to_end_ptr, chunk_decay_ptr,
    length, heads, padded, dt_b, dt_t, dt_h,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute step sizes and decays of one chunk, from dt, mask and packing; sums in fp64."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = chunk * Q + tl.arange(0, Q)
    h = (tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    valid_head = h < heads
    real = token_mask(mask_ptr, row, t, length, HAS_MASK)
    keep = real[:, None] & valid_head[None, :]
    at = dt_ptr + row * dt_b + t.to(tl.int64)[:, None] * dt_t + h[None, :] * dt_h
    step = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias_ptr + h, mask=valid_head, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(keep, step, 0.0)
    rate = tl.load(A_ptr + h, mask=valid_head, other=0.0).to(tl.float32)
    log_decay = (step * rate[None, :]).to(tl.float64)
    total = tl.sum(log_decay, axis=0)
    sums = tl.cumsum(log_decay, axis=0)
    high = sums.to(tl.float32)
    low = (sums - high.to(tl.float64)).to(tl.float32)
    from_start = tl.exp(high)
    to_end = tl.exp((total[None, :] - sums).to(tl.float32))
    chunk_decay = tl.exp(total.to(tl.float32))
    if HAS_SEGMENTS:
        # Decays between packed sequences are 0. The initial state belongs to sequence 0.
        of_row = segment_ptr + row * length
        segment = tl.load(of_row + tl.minimum(t, length - 1))
        before = tl.load(of_row + tl.maximum(chunk * Q - 1, 0))
        before = tl.where(chunk == 0, 0, before)
        last = tl.load(of_row + tl.minimum(chunk * Q + Q - 1, length - 1))
        from_start = tl.where((segment == before)[:, None], from_start, 0.0)
        to_end = tl.where((segment == last)[:, None], to_end, 0.0)
        chunk_decay = tl.where(before == last, chunk_decay, 0.0)
    row_head = row * heads + h
    out = row_head[None, :] * padded + t[:, None]
    stored = (t < padded)[:, None] & valid_head[None, :]
    tl.store(step_ptr + out, step, mask=stored)
    tl.store(high_ptr + out, high, mask=stored)
    tl.store(low_ptr + out, low, mask=stored)
    tl.store(from_start_ptr + out, from_start, mask=stored)
    tl.store(to_end_ptr + out, to_end, mask=stored)
    tl.store(chunk_decay_ptr + row_head * (padded // Q) + chunk, chunk_decay, mask=valid_head)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def span_states(
    k_ptr, v_ptr, mask_ptr, step_ptr, weight_ptr, chunk_decay_ptr, state_ptr, decay_ptr,
    length, heads, padded, num_spans, per_span,
    k_b, k_t, k_h, v_b, v_t, v_h, state_k, state_v,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, Q: tl.constexpr, REVERSE: tl.constexpr,
    HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Contribution of a span's tokens to the state at its end, and the decay of the span.

    In reverse, at its start. `weight` is the decay from each token to that end of its chunk. The
    state is (K_DIM, V_DIM) with strides state_k and state_v.
    """
    tiles = tl.cdiv(V_DIM, BLOCK_V)
    of_span, span = grid_position(tiles * heads, FOLDED)
    tile, head = of_span % tiles, (of_span // tiles).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    chunks = padded // Q
    first = span * per_span
    count = tl.minimum(per_span, chunks - first)
    t = tl.arange(0, Q)
    dk = tl.arange(0, BLOCK_K)
    dv = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    row_head = row * heads + head
    k_ptr += row * k_b + (head // K_GROUP) * k_h
    v_ptr += row * v_b + (head // V_GROUP) * v_h
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    decay = 1.0
    for i in range(count):
        chunk = first + i
        if REVERSE:
            chunk = first + count - 1 - i
        start = chunk * Q
        real = token_mask(mask_ptr, row, start + t, length, HAS_MASK)
        k = load_rows(k_ptr, start, t, real, dk, k_t, K_DIM, DTYPE)
        v = load_rows(v_ptr, start, t, real, dv, v_t, V_DIM, DTYPE)
        at = row_head * padded + start + t
        weight = tl.load(weight_ptr + at)
        if not REVERSE:
            weight *= tl.load(step_ptr + at)
        chunk_decay = tl.load(chunk_decay_ptr + row_head * chunks + chunk)
        # Scale x forwards and C in reverse, so that rounding is the same as in `span_outputs`.
        if REVERSE:
            k = (k * weight[:, None]).to(DTYPE)
        else:
            v = (v * weight[:, None]).to(DTYPE)
        state = tl.dot(tl.trans(k), v, state * chunk_decay, input_precision=PRECISION)
        decay *= chunk_decay
    place = (row * num_spans + span) * heads + head
    out = state_ptr + place * K_DIM * V_DIM + dk[:, None] * state_k + dv[None, :] * state_v
    tl.store(out, state, mask=(dk < K_DIM)[:, None] & (dv < V_DIM)[None, :])
    if tile == 0:
        tl.store(decay_ptr + place, decay)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pass_states(
    state_ptr, decay_ptr, first_ptr, last_ptr, entering_ptr, final_ptr, product_ptr,
    heads, num_spans, size, blocks,
    HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr, ONE_CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn each span's contribution into its initial state, in place; the final state to `last`.

    This is the recurrence over spans, S <- S decay + contribution, starting from `first` or 0.

    In reverse, `state` holds gradients, and each span's becomes the gradient at its end. `product`
    receives its dot product with the forward state there (`entering` of the next span, or `final`),
    by blocks of BLOCK elements. With ONE_CHUNK, the second factor is the span's initial state
    decayed to its end.
    """
    block, row_head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    row, head = row_head // heads, row_head % heads
    e = block * BLOCK + tl.arange(0, BLOCK)
    keep = e < size
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + row_head * size + e, mask=keep, other=0.0).to(tl.float32)
    end_state = state
    if REVERSE:
        end_state = tl.load(final_ptr + row_head * size + e, mask=keep, other=0.0)
    # Each iteration reads and writes its own span, so loads can be prefetched.
    for i in tl.range(num_spans, num_stages=4):
        span = i
        if REVERSE:
            span = num_spans - 1 - i
        place = (row * num_spans + span) * heads + head
        at = place * size + e
        added = tl.load(state_ptr + at, mask=keep, other=0.0)
        decay = tl.load(decay_ptr + place)
        tl.store(state_ptr + at, state, mask=keep)
        if REVERSE:
            initial = tl.load(entering_ptr + at, mask=keep, other=0.0)
            if ONE_CHUNK:
                end_state = initial * decay
            tl.store(product_ptr + place * blocks + block, tl.sum(state * end_state, axis=0))
            end_state = initial
        state = state * decay + added
    tl.store(last_ptr + row_head * size + e, state, mask=keep)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def span_outputs(
    q_ptr, k_ptr, v_ptr, own_ptr, mask_ptr, segment_ptr,
    step_ptr, high_ptr, low_ptr, from_start_ptr, to_end_ptr, chunk_decay_ptr,
    state_ptr, D_ptr, out_ptr, state_dot_ptr, total_dot_ptr, pair_sum_ptr, skip_ptr,
    length, heads, padded, num_spans, per_span,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, own_b, own_t, own_h,
    state_k, state_v,
    Q_GROUP: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, OWN_GROUP: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    Q: tl.constexpr, REVERSE: tl.constexpr, SCALE_K: tl.constexpr, DOTS: tl.constexpr,
    PAIRS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, USE_PTX: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Decayed attention of one span, (B, T, H, V_DIM), from the span's initial state.

    Forwards, the step size of a key scales its contribution; in reverse, the step size of a query
    scales its output. SCALE_K says which factor of the outer product that updates the state is
    scaled and rounded, K or V.

    Optional reductions for `decay_gradients`, with `own` the forward operand of the output:
      DOTS 1: `state_dot` (tiles, B, H, padded T), the dot product of `own` and the output's part
          that comes from the state.
      DOTS 2: the same times the step size, and `total_dot` of the same shape, the dot product of
          `own` and the whole output before the step size and the skip connection.
      PAIRS: in reverse, with q = x, k = dy, v = C and `own` = B. `pair_sum` (2, tiles, B, H,
          padded T), the gradients of a from pairs of tokens within a chunk: to be added at the
          token that reads, to be subtracted at the token that writes; and `skip` (B, H, chunks),
          the sum of x dy.
    `decay_gradients` subtracts sums of `state_dot` from each other. So their factors are rounded as
    they are for the state updates, and the state itself is not rounded.
    """
    tiles = tl.cdiv(V_DIM, BLOCK_V)
    of_span, span = grid_position(tiles * heads, FOLDED)
    tile, head = of_span % tiles, (of_span // tiles).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    chunks = padded // Q
    first = span * per_span
    count = tl.minimum(per_span, chunks - first)
    t = tl.arange(0, Q)
    dk = tl.arange(0, BLOCK_K)
    dv = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    row_head = row * heads + head
    q_ptr += row * q_b + (head // Q_GROUP) * q_h
    k_ptr += row * k_b + (head // K_GROUP) * k_h
    v_ptr += row * v_b + (head // V_GROUP) * v_h
    own_ptr += row * own_b + (head // OWN_GROUP) * own_h
    out_ptr += row * length * heads * V_DIM + head * V_DIM
    in_state = (dk < K_DIM)[:, None] & (dv < V_DIM)[None, :]
    place = (row * num_spans + span) * heads + head
    at_state = state_ptr + place * K_DIM * V_DIM + dk[:, None] * state_k + dv[None, :] * state_v
    state = tl.load(at_state, mask=in_state, other=0.0)
    for i in range(count):
        chunk = first + i
        if REVERSE:
            chunk = first + count - 1 - i
        start = chunk * Q
        real = token_mask(mask_ptr, row, start + t, length, HAS_MASK)
        q = load_rows(q_ptr, start, t, real, dk, q_t, K_DIM, DTYPE)
        k = load_rows(k_ptr, start, t, real, dk, k_t, K_DIM, DTYPE)
        v = load_rows(v_ptr, start, t, real, dv, v_t, V_DIM, DTYPE)
        at = row_head * padded + start + t
        step, high, low = tl.load(step_ptr + at), tl.load(high_ptr + at), tl.load(low_ptr + at)
        from_start, to_end = tl.load(from_start_ptr + at), tl.load(to_end_ptr + at)
        chunk_decay = tl.load(chunk_decay_ptr + row_head * chunks + chunk)

        if REVERSE:
            decay_in, decay_out = to_end, from_start
        else:
            decay_in, decay_out = from_start, to_end * step
        if DOTS > 0:
            # Load early to hide the latency.
            own = load_rows(own_ptr, start, t, real, dv, own_t, V_DIM, tl.float32)
        # With DOTS, the product with a bf16 state adds the rounding error of the state.
        rounded = state.to(DTYPE)
        from_state = tl.dot(q, rounded, input_precision=PRECISION)
        if DOTS > 0 and tl.bfloat16 == DTYPE:
            from_state = tl.dot(q, (state - rounded.to(tl.float32)).to(DTYPE), from_state)
        if DOTS > 0:
            of_tile = tile * tl.num_programs(2) * heads * padded + at
            if REVERSE:
                scaled = round_to(own * (to_end * step)[:, None], DTYPE, USE_PTX)
            else:
                scaled = round_to(own * from_start[:, None], DTYPE, USE_PTX)
            tl.store(state_dot_ptr + of_tile, tl.sum(scaled * from_state, axis=1))
        from_state *= decay_in[:, None]
        # Update the state before the scores: holding k and v any longer would spill registers.
        if SCALE_K:
            update_k, update_v = (k * decay_out[:, None]).to(DTYPE), v
        else:
            update_k, update_v = k, (v * decay_out[:, None]).to(DTYPE)
        state = tl.dot(tl.trans(update_k), update_v, state * chunk_decay, input_precision=PRECISION)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        log_decay = high[:, None] - high[None, :]
        if tl.float32 == DTYPE:
            # Below the precision of 16-bit scores.
            log_decay += low[:, None] - low[None, :]
        if PAIRS:
            skip = tl.sum(tl.where(t[:, None] == t[None, :], scores, 0.0), axis=1)
            if tile == 0:
                tl.store(skip_ptr + row_head * chunks + chunk, tl.sum(skip, axis=0))
        if REVERSE:
            allowed = t[:, None] <= t[None, :]
            log_decay = -log_decay
        else:
            allowed = t[:, None] >= t[None, :]
            scores *= step[None, :]
        if HAS_SEGMENTS:
            at_t = tl.minimum(start + t, length - 1)
            segment = tl.load(segment_ptr + row * length + at_t)
            allowed = allowed & (segment[:, None] == segment[None, :])
        scores = tl.where(allowed, scores * exp_ftz(log_decay, USE_PTX), 0.0)

        if PAIRS:
            own = load_rows(own_ptr, start, t, real, dv, own_t, V_DIM, DTYPE)
            pairs = tl.dot(own, tl.trans(v), input_precision=PRECISION) * scores * step[:, None]
            # The diagonal has no decay.
            pairs = tl.where(t[:, None] == t[None, :], 0.0, pairs)
            of_kind = tl.num_programs(2) * heads * padded
            at_pairs = pair_sum_ptr + tile * of_kind + at
            tl.store(at_pairs, tl.sum(pairs, axis=0))
            tl.store(at_pairs + tiles * of_kind, tl.sum(pairs, axis=1))
        out = tl.dot(scores.to(DTYPE), v, from_state, input_precision=PRECISION)
        if DOTS == 2:
            tl.store(total_dot_ptr + of_tile, tl.sum(own * out, axis=1))
        if REVERSE:
            out *= step[:, None]
        if HAS_D:
            out += tl.load(D_ptr + head).to(tl.float32) * v.to(tl.float32)
        at_out = out_ptr + start.to(tl.int64) * heads * V_DIM
        at_out += t[:, None] * heads * V_DIM + dv[None, :]
        stored = (start + t < length)[:, None] & (dv < V_DIM)[None, :]
        tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=stored)
