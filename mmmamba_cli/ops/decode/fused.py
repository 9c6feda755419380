"""One token through a mixer: one launch for Mamba-2, two for attention."""

import math

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from mmmamba_cli.ops.decode import kernels
from mmmamba_cli.ops.decode.mamba_step import MixerWeights
from mmmamba_cli.ops.triton_utils import (
    block,
    buffer,
    check_inputs,
    dense_rows,
    either,
    launch_grid,
    on_device,
    overlapping,
)

# Fixed, not searched for at run time; for an H100. Values of a head that a program takes: few
# where there is one row, so that there are programs for all processors.
FEW_ROWS, VALUES_OF_FEW, VALUES_OF_MANY = 4, 16, 128
MIXER_WARPS = 4
# Programs that read a cache, two for each of 132 processors, columns of a tile by bytes of a
# number, and tiles under way.
PROGRAMS = 264
COLUMNS = {2: 64, 4: 32}
ATTENTION_WARPS, STAGES = 4, 3
COMBINE_VALUES, COMBINE_WARPS = 32, 4
# Programs that look through a row of logits, and how many each looks at at once.
PARTS, LOGITS, LOGITS_WARPS = 32, 1024, 4


def mixer_step(
    vkq: Tensor,
    dt: Tensor,
    conv_ring: Tensor,
    ssm_state: Tensor,
    position: Tensor,
    weights: MixerWeights,
    *,
    settled: bool,
) -> Tensor:
    """Shapes as in `ops.mixer_step`; no gradients."""
    check_inputs("mixer_step", vkq, dt, conv_ring, ssm_state, *weights)
    if not (conv_ring.is_contiguous() and ssm_state.is_contiguous()):
        raise ValueError("mixer_step: the states, which are changed in place, are not contiguous")
    if ssm_state.dtype != torch.float32:
        raise ValueError(f"mixer_step: ssm_state is {ssm_state.dtype}, expected fp32")
    batch, heads, value_dim, state_dim = ssm_state.shape
    channels, taps = weights.conv_weight.shape
    kv_heads = (channels - heads * state_dim) // (value_dim + state_dim)
    vkq, dt = dense_rows(vkq), dense_rows(dt)
    out = buffer(batch, heads, value_dim, like=vkq, dtype=vkq.dtype)
    bias, dt_bias, D = weights.conv_bias, weights.dt_bias, weights.D
    values = VALUES_OF_FEW if batch <= FEW_ROWS else VALUES_OF_MANY
    values = min(values, next_power_of_2(value_dim))
    # A copy that is made here is not there before the launch before.
    settled &= all(weight is None or weight.is_contiguous() for weight in weights)
    with on_device(vkq):
        kernels.mixer_step[launch_grid("mixer_step", cdiv(value_dim, values), heads, batch)](
            vkq, dt, conv_ring, ssm_state, position, out,
            weights.conv_weight.contiguous(), either(bias, vkq), weights.A.contiguous(),
            either(dt_bias, vkq), either(D, vkq), heads, channels, vkq.stride(0), dt.stride(0),
            SHARE=heads // kv_heads, P=value_dim, N=state_dim, W=taps,
            HAS_BIAS=bias is not None, HAS_DT_BIAS=dt_bias is not None, HAS_D=D is not None,
            BLOCK_P=values, BLOCK_N=next_power_of_2(state_dim), SETTLED=settled,
            num_warps=MIXER_WARPS, **overlapping(vkq),
        )  # fmt: skip
    return out


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    starts: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Shapes as in `ops.attention_step`; no gradients."""
    check_inputs("attention_step", q, k, v, keys, values, cos, sin)
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("attention_step: numbers of a head do not lie side by side in the cache")
    batch, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    q, k, v = (_dense_heads(tensor) for tensor in (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    columns = COLUMNS[keys.element_size()]
    shares = max(1, min(PROGRAMS // (batch * kv_heads), cdiv(capacity, columns)))
    part = buffer(batch, heads, shares, dim, like=q)
    top, total = (buffer(batch, heads, shares, like=q) for _ in range(2))
    out = buffer(batch, heads * dim, like=q, dtype=q.dtype)
    with on_device(q):
        kernels.attend[launch_grid("attention_step", shares, kv_heads, batch)](
            q, k, v, keys, values, position, position if starts is None else starts, cos, sin,
            part, top, total, q.stride(0), k.stride(0), v.stride(0),
            *keys.stride()[:3], *values.stride()[:3], 0 if len(cos) == 1 else dim,
            math.log2(math.e) / math.sqrt(dim),
            SHARE=heads // kv_heads, P=dim, HAS_STARTS=starts is not None,
            DTYPE=_product_type(q, keys, values), BLOCK_G=block(heads // kv_heads),
            BLOCK_P=block(dim), BLOCK_S=columns, num_warps=ATTENTION_WARPS, num_stages=STAGES,
            **overlapping(q),
        )  # fmt: skip
        blocks = cdiv(dim, COMBINE_VALUES)
        kernels.combine[launch_grid("attention_step", batch * heads * blocks)](
            part, top, total, out, shares, P=dim, BLOCK_C=next_power_of_2(shares),
            BLOCK_P=COMBINE_VALUES, num_warps=COMBINE_WARPS, **overlapping(q),
        )  # fmt: skip
    return out


def _product_type(*tensors: Tensor) -> tl.dtype:
    """What tensor cores multiply: numbers of two bytes if all tensors have the same, else fp32."""
    kinds = {tensor.dtype for tensor in tensors}
    halves = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return halves.get(kinds.pop(), tl.float32) if len(kinds) == 1 else tl.float32


def _dense_heads(tensor: Tensor) -> Tensor:
    """(B, heads, P) with heads side by side; rows may lie apart."""
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()


def likeliest(logits: Tensor, unwanted: Tensor) -> Tensor:
    """Shapes as in `ops.likeliest`."""
    check_inputs("likeliest", logits)
    logits, unwanted = dense_rows(logits), unwanted.contiguous().view(torch.uint8)
    batch, size = logits.shape
    best = buffer(batch, PARTS, like=logits)
    at = buffer(batch, PARTS, like=logits, dtype=torch.int32)
    out = buffer(batch, like=logits, dtype=torch.int64)
    with on_device(logits):
        kernels.largest_of_parts[launch_grid("likeliest", PARTS * batch)](
            logits, unwanted, best, at, size, logits.stride(0), PARTS=PARTS, BLOCK=LOGITS,
            num_warps=LOGITS_WARPS, **overlapping(logits),
        )  # fmt: skip
        kernels.largest_of_all[launch_grid("likeliest", batch)](
            best, at, out, size, PARTS=PARTS, num_warps=1, **overlapping(logits)
        )
    return out
