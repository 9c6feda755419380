"""Triton kernels of RMSNorm, plain and gated, and of its gradients; `fused.py` launches them.

Legend: R rows, D size of the normalized dimension. A program holds BLOCK_R whole rows. Only the
inputs are saved for the backward pass.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, r, d, keep, D: tl.constexpr):
    at = ptr + r.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(at, mask=keep, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def norm(
    x_ptr, gate_ptr, weight_ptr, out_ptr, num_rows, eps, gate_t,
    GATED: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """RMSNorm(x) * weight, (R, D); if GATED, times SiLU(gate).

    The plain norm is rounded to x's dtype before the weight, as in Llama; the gated one is rounded
    once, at the end. HEADS rows of the gate are contiguous, and `gate_t` is the stride between such
    groups.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    keep = (r < num_rows)[:, None] & (d < D)[None, :]
    x = load_rows(x_ptr, r, d, keep, D)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    out = x * scale[:, None]
    if GATED:
        at = gate_ptr + (r // HEADS).to(tl.int64)[:, None] * gate_t + (r % HEADS * D)[:, None]
        gate = tl.load(at + d[None, :], mask=keep, other=0.0).to(tl.float32)
        out = out * weight[None, :] * (gate * tl.sigmoid(gate))
    else:
        out = out.to(x_ptr.dtype.element_ty).to(tl.float32) * weight[None, :]
    at = out_ptr + r.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_rows"])
def gradients(
    x_ptr, gate_ptr, weight_ptr, dout_ptr, dx_ptr, dgate_ptr, dweight_ptr, num_rows, eps,
    GATED: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of x and gate (R, D), and partial gradients of the weight, (programs, D).

    Grid-stride loop over rows, with one partial weight gradient per program: one per row would be
    as much memory traffic as x.
    """
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        keep = (r < num_rows)[:, None] & (d < D)[None, :]
        x = load_rows(x_ptr, r, d, keep, D)
        dout = load_rows(dout_ptr, r, d, keep, D)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        normed = x * scale[:, None]
        at = r.to(tl.int64)[:, None] * D + d[None, :]
        if GATED:
            gate = load_rows(gate_ptr, r, d, keep, D)
            sig = tl.sigmoid(gate)
            dgate = dout * normed * weight[None, :] * (sig * (1.0 + gate * (1.0 - sig)))
            tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=keep)
            dout *= gate * sig
        dweight += tl.sum(dout * normed, axis=0)
        dnormed = dout * weight[None, :]
        along = tl.sum(dnormed * normed, axis=1) / D
        dx = (dnormed - normed * along[:, None]) * scale[:, None]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)
    tl.store(dweight_ptr + tl.program_id(0) * D + d, dweight, mask=d < D)
