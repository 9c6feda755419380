"""Triton kernels of the causal depthwise convolution with SiLU; `fused.py` launches them.

Legend: B batch, T tokens, Ch channels, W taps. Only the inputs are saved for the backward pass,
which recomputes the sum before SiLU. Suffixes of strides: _b batch, _t token.
"""

import triton
import triton.language as tl

from mmmamba_cli.ops.triton_utils import grid_position


@triton.jit
def input_rows(
    x_ptr, first_ptr, t, least, of_t, ch, of_ch, x_t, W: tl.constexpr, HAS_FIRST: tl.constexpr
):
    """Inputs at times t; those from -(W - 1) to -1 come from the initial state.

    `least` is the smallest t, which lets most programs skip the state.
    """
    at = x_ptr + t.to(tl.int64)[:, None] * x_t + ch[None, :]
    rows = tl.load(at, mask=(of_t & (t >= 0))[:, None] & of_ch[None, :], other=0.0).to(tl.float32)
    # Nested, because HAS_FIRST is a compile-time constant and `least` is not.
    if HAS_FIRST:  # noqa: SIM102
        if least < 0:
            at = first_ptr + ch[None, :] * (W - 1) + (t + W - 1)[:, None]
            past = (of_t & (t < 0) & (t >= 1 - W))[:, None] & of_ch[None, :]
            rows += tl.load(at, mask=past, other=0.0).to(tl.float32)
    return rows


@triton.jit
def segment_of(segment_ptr, t, length):
    """Ordinal of the packed sequence at times t; times before 0 belong to sequence 0."""
    within = tl.minimum(tl.maximum(t, 0), length - 1)
    return tl.where(t < 0, 0, tl.load(segment_ptr + within))


@triton.jit
def sums_of_taps(
    x_ptr, first_ptr, weight_ptr, bias_ptr, segment_ptr, t, least, ch, of_ch, length, x_t,
    W: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The convolution at times t before the activation, (BLOCK_T, BLOCK_C) in fp32."""
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + ch, mask=of_ch, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(W):
        tap = tl.load(weight_ptr + ch * W + (W - 1 - back), mask=of_ch, other=0.0).to(tl.float32)
        rows = input_rows(
            x_ptr, first_ptr, t - back, least - back, t < length, ch, of_ch, x_t, W, HAS_FIRST
        )
        if HAS_SEGMENTS:
            same = segment_of(segment_ptr, t - back, length) == segment_of(segment_ptr, t, length)
            rows = tl.where(same[:, None], rows, 0.0)
        total += rows * tap[None, :]
    return total


@triton.jit(do_not_specialize=["length"])
def convolve(
    x_ptr, first_ptr, weight_ptr, bias_ptr, segment_ptr, y_ptr, length, channels, x_b, x_t,
    W: tl.constexpr, SILU: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Compute y (B, T, Ch); a program has BLOCK_T tokens of BLOCK_C channels."""
    row = tl.program_id(2).to(tl.int64)
    of_channels, of_time = grid_position(tl.cdiv(channels, BLOCK_C), FOLDED)
    start = of_time * BLOCK_T
    t = start + tl.arange(0, BLOCK_T)
    ch = of_channels * BLOCK_C + tl.arange(0, BLOCK_C)
    of_ch = ch < channels
    y = sums_of_taps(
        x_ptr + row * x_b, first_ptr + row * channels * (W - 1), weight_ptr, bias_ptr,
        segment_ptr + row * length, t, start, ch, of_ch, length, x_t,
        W, HAS_FIRST, HAS_BIAS, HAS_SEGMENTS, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    if SILU:
        y *= tl.sigmoid(y)
    at = y_ptr + row * length * channels + t.to(tl.int64)[:, None] * channels + ch[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(t < length)[:, None] & of_ch[None, :])


@triton.jit(do_not_specialize=["length"])
def gradients(
    x_ptr, first_ptr, weight_ptr, bias_ptr, segment_ptr, dy_ptr,
    dx_ptr, dfirst_ptr, dweight_ptr, dbias_ptr, length, channels, x_b, x_t, dy_b, dy_t,
    W: tl.constexpr, SILU: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Gradients of x and initial state, and partial gradients of weight and bias.

    Each program along T writes one partial gradient per row: (B * programs, Ch, W) for the weight,
    (B * programs, Ch) for the bias.
    """
    row = tl.program_id(2).to(tl.int64)
    of_channels, of_time = grid_position(tl.cdiv(channels, BLOCK_C), FOLDED)
    # Times start at -(W - 1): dx at negative times is the gradient of the initial state.
    start = of_time * BLOCK_T - (W - 1)
    t = start + tl.arange(0, BLOCK_T)
    ch = of_channels * BLOCK_C + tl.arange(0, BLOCK_C)
    of_ch = ch < channels
    x_ptr += row * x_b
    dy_ptr += row * dy_b
    first_ptr += row * channels * (W - 1)
    segment_ptr += row * length
    part = row * tl.cdiv(length + W - 1, BLOCK_T) + of_time
    dx = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for ahead in tl.static_range(W):
        then = t + ahead
        real = ((then >= 0) & (then < length))[:, None] & of_ch[None, :]
        at = dy_ptr + then.to(tl.int64)[:, None] * dy_t + ch[None, :]
        dz = tl.load(at, mask=real, other=0.0).to(tl.float32)
        if SILU:
            z = sums_of_taps(
                x_ptr, first_ptr, weight_ptr, bias_ptr, segment_ptr, then, start + ahead, ch, of_ch,
                length, x_t, W, HAS_FIRST, HAS_BIAS, HAS_SEGMENTS, BLOCK_T, BLOCK_C,
            )  # fmt: skip
            gate = tl.sigmoid(z)
            dz *= gate * (1.0 + z * (1.0 - gate))
        if ahead == 0:
            if HAS_BIAS:
                tl.store(dbias_ptr + part * channels + ch, tl.sum(dz, axis=0), mask=of_ch)
            for back in tl.static_range(W):
                rows = input_rows(
                    x_ptr,
                    first_ptr,
                    t - back,
                    start - back,
                    t < length,
                    ch,
                    of_ch,
                    x_t,
                    W,
                    HAS_FIRST,
                )
                if HAS_SEGMENTS:
                    before = segment_of(segment_ptr, t - back, length)
                    same = before == segment_of(segment_ptr, t, length)
                    rows = tl.where(same[:, None], rows, 0.0)
                at = dweight_ptr + (part * channels + ch) * W + (W - 1 - back)
                tl.store(at, tl.sum(dz * rows, axis=0), mask=of_ch)
        if HAS_SEGMENTS:
            same = segment_of(segment_ptr, then, length) == segment_of(segment_ptr, t, length)
            dz = tl.where(same[:, None], dz, 0.0)
        tap = tl.load(weight_ptr + ch * W + (W - 1 - ahead), mask=of_ch, other=0.0).to(tl.float32)
        dx += dz * tap[None, :]
    at = dx_ptr + row * length * channels + t.to(tl.int64)[:, None] * channels + ch[None, :]
    within = ((t >= 0) & (t < length))[:, None] & of_ch[None, :]
    tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=within)
    if HAS_FIRST:
        at = dfirst_ptr + row * channels * (W - 1) + ch[None, :] * (W - 1) + (t + W - 1)[:, None]
        tl.store(at, dx, mask=(t < 0)[:, None] & of_ch[None, :])
