"""Triton kernels of a linear layer with few tokens (`fused.py`), and of SwiGLU (`products.py`).

A decoding step reads each weight once and is bound by memory bandwidth: each program prefetches the
next tile of weights while it multiplies the current one. Tiles are (B, R, K): tokens, rows of the
weight, inputs.
"""

import triton
import triton.language as tl

from mmmamba_cli.ops.triton_utils import launch_dependents, wait_for_inputs


@triton.jit
def load_weights(at, k, D: tl.constexpr, EVEN: tl.constexpr):
    """A tile of weights (1, R, K); evicted first from the L2 cache, as it is read only once."""
    if EVEN:
        tile = tl.load(at, eviction_policy="evict_first")
    else:
        tile = tl.load(at, mask=k < D, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def to_fp32(tile, USE_PTX: tl.constexpr):
    """Weights in fp32, by inline PTX where it is available.

    The compiler would unpack a tile before it issues further loads, and converts int8 with a slow
    instruction. The PTX instead puts a byte into the mantissa of 2 ** 23 and subtracts 2 ** 23.
    """
    if USE_PTX and tile.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [tile], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    elif USE_PTX and tile.dtype == tl.int8:
        wide = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, a, b, c, d;
            xor.b32 bytes, $4, 0x80808080;
            prmt.b32 a, bytes, 0x4b000000, 0x7540;
            prmt.b32 b, bytes, 0x4b000000, 0x7541;
            prmt.b32 c, bytes, 0x4b000000, 0x7542;
            prmt.b32 d, bytes, 0x4b000000, 0x7543;
            sub.f32 $0, a, 0f4b000080;
            sub.f32 $1, b, 0f4b000080;
            sub.f32 $2, c, 0f4b000080;
            sub.f32 $3, d, 0f4b000080;
            }""",
            "=r,=r,=r,=r,r", [tile], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = tile.to(tl.float32)
    return wide


@triton.jit
def load_gate(
    gate_ptr, norm_ptr, b, k, gate_b,
    B: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """SiLU of the gate (B, 1, K), times the norm's weight if there is one."""
    gate = tl.load(gate_ptr + b * gate_b + k, mask=(b < B) & (k < D), other=0.0).to(tl.float32)
    gate *= tl.sigmoid(gate)
    if HAS_WEIGHT:
        gate *= tl.load(norm_ptr + k % P).to(tl.float32)
    return gate


@triton.jit
def load_inputs(
    x_ptr, norm_ptr, gate_ptr, gate, b, k, x_b, gate_b, eps,
    B: tl.constexpr, D: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, EVEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUTS_READY: tl.constexpr,
):  # fmt: skip
    """x (B, 1, K) before the product, and its squares; the scale of a plain norm is applied later.

    With P, each head of P is normalized and gated here; with INPUTS_READY, by the `gate` that was
    loaded earlier.
    """
    keep = (b < B) & (k < D)
    x = tl.load(x_ptr + b * x_b + k, mask=keep, other=0.0).to(tl.float32)
    squares = x * x
    if P > 0:
        mean = tl.sum(tl.reshape(squares, (BLOCK_B, BLOCK_K // P, P)), axis=2) / P
        scale = tl.rsqrt(mean + eps)[:, :, None].broadcast_to(BLOCK_B, BLOCK_K // P, P)
        x *= tl.reshape(scale, (BLOCK_B, 1, BLOCK_K))
        if not INPUTS_READY:
            gate = load_gate(gate_ptr, norm_ptr, b, k, gate_b, B, D, P, HAS_WEIGHT)
        x *= gate
        if not EVEN:
            # Without eps, elements after the last head are 0 / 0.
            x = tl.where(k < D, x, 0.0)
    elif NORM and HAS_WEIGHT:
        x *= tl.load(norm_ptr + k, mask=k < D, other=0.0).to(tl.float32)
    return x, squares


@triton.jit
def project(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_ptr, gate_ptr, residual_ptr, out_ptr,
    num_out, x_b, gate_b, residual_b, out_b, eps,
    B: tl.constexpr, D: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SWIGLU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUTS_READY: tl.constexpr, ALIGNED_BY_8: tl.constexpr, USE_PTX: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """R rows of the weight for all tokens; with SWIGLU, rows of both halves alternate.

    INPUTS_READY: the gate was written before the previous launch began, and K covers all inputs.
    """
    EVEN: tl.constexpr = D % BLOCK_K == 0
    STEPS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    OUTS: tl.constexpr = BLOCK_R // 2 if SWIGLU else BLOCK_R
    r = tl.arange(0, BLOCK_R)
    # Rows beyond the last repeat it; their results are not stored.
    if SWIGLU:
        row = tl.minimum(tl.program_id(0) * OUTS + r // 2, num_out - 1) + r % 2 * num_out
    else:
        row = tl.minimum(tl.program_id(0) * OUTS + r, num_out - 1)
    b = tl.arange(0, BLOCK_B)[:, None, None]
    k = tl.arange(0, BLOCK_K)[None, None, :]
    at = weight_ptr + row.to(tl.int64)[None, :, None] * D + k
    if ALIGNED_BY_8:
        # Vectors of eight, as x is loaded, so that a thread's weights and inputs match.
        at = tl.multiple_of(at, [8, 8, 8])
    tile = load_weights(at, k, D, EVEN)
    gate = 0.0
    if INPUTS_READY:
        gate = load_gate(gate_ptr, norm_ptr, b, k, gate_b, B, D, P, HAS_WEIGHT)
    # The previous launch may write everything but the weights.
    wait_for_inputs(USE_PDL)
    launch_dependents(USE_PDL)

    acc = tl.zeros((BLOCK_B, BLOCK_R, BLOCK_K), tl.float32)
    sum_squares = tl.zeros((BLOCK_B, 1, BLOCK_K), tl.float32)
    for step in range(STEPS - 1):
        first = step * BLOCK_K
        next_tile = load_weights(at + first + BLOCK_K, k + first + BLOCK_K, D, EVEN)
        x, squares = load_inputs(
            x_ptr, norm_ptr, gate_ptr, gate, b, k + first, x_b, gate_b, eps,
            B, D, P, NORM, HAS_WEIGHT, EVEN, BLOCK_B, BLOCK_K, INPUTS_READY,
        )  # fmt: skip
        acc += to_fp32(tile, USE_PTX) * x
        sum_squares += squares
        tile = next_tile
    x, squares = load_inputs(
        x_ptr, norm_ptr, gate_ptr, gate, b, k + (STEPS - 1) * BLOCK_K, x_b, gate_b, eps,
        B, D, P, NORM, HAS_WEIGHT, EVEN, BLOCK_B, BLOCK_K, INPUTS_READY,
    )  # fmt: skip
    y = tl.sum(acc + to_fp32(tile, USE_PTX) * x, axis=2)
    if NORM and P == 0:
        y *= tl.rsqrt(tl.sum(sum_squares + squares, axis=2) / D + eps)
    if HAS_SCALE:
        y *= tl.load(scale_ptr + row)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    if SWIGLU:
        half, other = tl.split(tl.reshape(y, (BLOCK_B, OUTS, 2)))
        y = half * tl.sigmoid(half) * other
    o = tl.program_id(0) * OUTS + tl.arange(0, OUTS)[None, :]
    b = tl.arange(0, BLOCK_B)[:, None]
    keep = (b < B) & (o < num_out)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + b * residual_b + o, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + b * out_b + o, y.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu(y_ptr, out_ptr, num_rows, size, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """silu(first half) * second half of each row of y (R, 2 * size), (R, size); rounded once."""
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    keep = (r < num_rows) & (d < size)
    at = y_ptr + r * 2 * size + d
    gate = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    value = tl.load(at + size, mask=keep, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * value
    tl.store(out_ptr + r * size + d, y.to(out_ptr.dtype.element_ty), mask=keep)
