"""Triton kernel of one decoding step of a Gated DeltaNet mixer; `delta_fused.py` launches it.

Legend: B batch, H query heads, K key/value heads, P value dim, N key dim, Ch channels, W taps.
"""

import triton
import triton.language as tl

from mmmamba_cli.ops.decode.kernels import conv_history, conv_silu_step
from mmmamba_cli.ops.ssd.kernels import softplus
from mmmamba_cli.ops.triton_utils import launch_dependents, wait_for_inputs

# Added to the sum of squares of q and k.
NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def delta_mixer_step(
    x_ptr, gates_ptr, ring_ptr, state_ptr, position_ptr, out_ptr,
    weight_ptr, bias_ptr, A_ptr, dt_bias_ptr, beta_bias_ptr,
    heads, channels, x_b, gates_b, scale,
    GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUTS_READY: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_P values of one head of one row; their part of the state is read and written once.

    A program holds all N keys of its values, so that S k and S q are sums within it.
    INPUTS_READY: everything but x and the gates was written before the previous launch began, and
    is read while that launch runs. Nothing is written until it has ended.
    """
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    shared, kv_heads = head // GROUP, heads // GROUP
    p, n = part * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    state_at = state_ptr + (row * heads + head) * P * N + p[:, None] * N + n[None, :]
    keep = mask_p[:, None] & mask_n[None, :]
    x_ptr += row * x_b
    ring_ptr += row * channels * W
    gates_ptr += row * gates_b
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
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    beta_bias = tl.load(beta_bias_ptr + head).to(tl.float32)
    if INPUTS_READY:
        wait_for_inputs(USE_PDL)
    launch_dependents(USE_PDL)
    for_all, first = head % GROUP == 0, part == 0
    v = conv_silu_step(x_ptr, ring_ptr, v, w_v, ch_v, mask_p, for_all, position, W)
    k = conv_silu_step(x_ptr, ring_ptr, k, w_k, ch_k, mask_n, for_all & first, position, W)
    q = conv_silu_step(x_ptr, ring_ptr, q, w_q, ch_q, mask_n, first, position, W)
    k = k * tl.rsqrt(tl.sum(k * k, axis=0) + NORM_EPS)
    q = q * (tl.rsqrt(tl.sum(q * q, axis=0) + NORM_EPS) * scale)
    step = softplus(tl.load(gates_ptr + head).to(tl.float32) + dt_bias)
    beta = tl.sigmoid(tl.load(gates_ptr + heads + head).to(tl.float32) + beta_bias)
    state = state * tl.exp(step * rate)
    update = beta * (v - tl.sum(state * k[None, :], axis=1))
    state = state + update[:, None] * k[None, :]
    tl.store(state_at, state, mask=keep)
    y = tl.sum(state * q[None, :], axis=1)
    out = out_ptr + (row * heads + head) * P + p
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask_p)
