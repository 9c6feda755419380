"""Launchers of the decoding kernels: one launch for Mamba-2, two for attention and argmax."""

import math

import torch
import triton.language as tl
from torch import Tensor

from mmmamba_cli.ops.decode import kernels
from mmmamba_cli.ops.decode.mamba_step import MixerWeights
from mmmamba_cli.ops.triton_utils import (
    block_size,
    buffer,
    cdiv,
    check_inputs,
    dense_rows,
    device_guard,
    launch_grid,
    next_power_of_2,
    or_dummy,
    pdl_options,
)

# All launch parameters are fixed, tuned for an H100. Values of a head per program: fewer for small
# batches, so that the grid fills all SMs.
SMALL_BATCH, SMALL_BATCH_BLOCK_P, LARGE_BATCH_BLOCK_P = 4, 16, 128
MIXER_WARPS = 4
# Programs that read a KV cache (two per SM of 132), columns of a tile by element size in bytes, and
# pipeline stages.
ATTENTION_PROGRAMS = 264
ATTENTION_BLOCK_S = {2: 64, 4: 32}
ATTENTION_WARPS, ATTENTION_STAGES = 4, 3
MERGE_BLOCK_P, MERGE_WARPS = 32, 4
# Programs per row of logits, and logits that each loads at a time.
ARGMAX_SPLITS, ARGMAX_BLOCK, ARGMAX_WARPS = 32, 1024, 4


def mixer_step(
    vkq: Tensor,
    dt: Tensor,
    conv_ring: Tensor,
    ssm_state: Tensor,
    position: Tensor,
    weights: MixerWeights,
    *,
    inputs_ready: bool,
) -> Tensor:
    """Shapes as in `ops.mixer_step`; no gradients."""
    check_inputs("mixer_step", vkq, dt, conv_ring, ssm_state, *weights)
    check_states("mixer_step", conv_ring, "ssm_state", ssm_state)
    batch, heads, value_dim, state_dim = ssm_state.shape
    channels, taps = weights.conv_weight.shape
    kv_heads = (channels - heads * state_dim) // (value_dim + state_dim)
    vkq, dt = dense_rows(vkq), dense_rows(dt)
    out = buffer(batch, heads, value_dim, like=vkq, dtype=vkq.dtype)
    bias, dt_bias, D = weights.conv_bias, weights.dt_bias, weights.D
    values = values_per_program(batch, value_dim)
    # A copy made here is launched too late to count as ready.
    inputs_ready &= all(weight is None or weight.is_contiguous() for weight in weights)
    with device_guard(vkq):
        kernels.mixer_step[launch_grid("mixer_step", cdiv(value_dim, values), heads, batch)](
            vkq, dt, conv_ring, ssm_state, position, out,
            weights.conv_weight.contiguous(), or_dummy(bias, vkq), weights.A.contiguous(),
            or_dummy(dt_bias, vkq), or_dummy(D, vkq), heads, channels, vkq.stride(0), dt.stride(0),
            GROUP=heads // kv_heads, P=value_dim, N=state_dim, W=taps,
            HAS_BIAS=bias is not None, HAS_DT_BIAS=dt_bias is not None, HAS_D=D is not None,
            BLOCK_P=values, BLOCK_N=next_power_of_2(state_dim), INPUTS_READY=inputs_ready,
            num_warps=MIXER_WARPS, **pdl_options(vkq),
        )  # fmt: skip
    return out


def check_states(op: str, conv_ring: Tensor, name: str, state: Tensor) -> None:
    """Raise ValueError for states that a kernel cannot change in place; `name` is of `state`."""
    if not (conv_ring.is_contiguous() and state.is_contiguous()):
        raise ValueError(f"{op}: the states, which are changed in place, are not contiguous")
    if state.dtype != torch.float32:
        raise ValueError(f"{op}: {name} is {state.dtype}, expected fp32")


def values_per_program(batch: int, value_dim: int) -> int:
    """Values of a head that one program computes, a power of 2."""
    values = SMALL_BATCH_BLOCK_P if batch <= SMALL_BATCH else LARGE_BATCH_BLOCK_P
    return min(values, next_power_of_2(value_dim))


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
    """Shapes as in `ops.attention_step`; no gradients.

    Raises:
        ValueError: the last dimension of `keys` or `values` is not contiguous.
        MmmambaError: see `check_inputs`.
    """
    check_inputs("attention_step", q, k, v, keys, values, cos, sin)
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("attention_step: numbers of a head do not lie side by side in the cache")
    batch, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    q, k, v = (_dense_heads(tensor) for tensor in (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    columns = ATTENTION_BLOCK_S[keys.element_size()]
    splits = max(1, min(ATTENTION_PROGRAMS // (batch * kv_heads), cdiv(capacity, columns)))
    part = buffer(batch, heads, splits, dim, like=q)
    row_max, row_sum = (buffer(batch, heads, splits, like=q) for _ in range(2))
    out = buffer(batch, heads * dim, like=q, dtype=q.dtype)
    with device_guard(q):
        kernels.attention_split[launch_grid("attention_step", splits, kv_heads, batch)](
            q, k, v, keys, values, position, position if starts is None else starts, cos, sin,
            part, row_max, row_sum, q.stride(0), k.stride(0), v.stride(0),
            *keys.stride()[:3], *values.stride()[:3], 0 if len(cos) == 1 else dim,
            math.log2(math.e) / math.sqrt(dim),
            GROUP=heads // kv_heads, P=dim, HAS_STARTS=starts is not None,
            DTYPE=_product_type(q, keys, values), BLOCK_G=block_size(heads // kv_heads),
            BLOCK_P=block_size(dim), BLOCK_S=columns, num_warps=ATTENTION_WARPS,
            num_stages=ATTENTION_STAGES, **pdl_options(q),
        )  # fmt: skip
        blocks = cdiv(dim, MERGE_BLOCK_P)
        kernels.merge_splits[launch_grid("attention_step", batch * heads * blocks)](
            part, row_max, row_sum, out, splits, P=dim, BLOCK_C=next_power_of_2(splits),
            BLOCK_P=MERGE_BLOCK_P, num_warps=MERGE_WARPS, **pdl_options(q),
        )  # fmt: skip
    return out


def _product_type(*tensors: Tensor) -> tl.dtype:
    """Operand dtype of the tensor cores: bf16 or fp16 if all tensors have it, else fp32."""
    kinds = {tensor.dtype for tensor in tensors}
    halves = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return halves.get(kinds.pop(), tl.float32) if len(kinds) == 1 else tl.float32


def _dense_heads(tensor: Tensor) -> Tensor:
    """(B, heads, P) with contiguous heads, copied only if they are not; rows may be strided."""
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()


def greedy_argmax(logits: Tensor, suppressed: Tensor) -> Tensor:
    """Shapes as in `ops.greedy_argmax`."""
    check_inputs("greedy_argmax", logits)
    logits, suppressed = dense_rows(logits), suppressed.contiguous().view(torch.uint8)
    batch, size = logits.shape
    best = buffer(batch, ARGMAX_SPLITS, like=logits)
    at = buffer(batch, ARGMAX_SPLITS, like=logits, dtype=torch.int32)
    out = buffer(batch, like=logits, dtype=torch.int64)
    with device_guard(logits):
        kernels.argmax_split[launch_grid("greedy_argmax", ARGMAX_SPLITS * batch)](
            logits, suppressed, best, at, size, logits.stride(0), SPLITS=ARGMAX_SPLITS,
            BLOCK=ARGMAX_BLOCK, num_warps=ARGMAX_WARPS, **pdl_options(logits),
        )  # fmt: skip
        kernels.argmax_merge[launch_grid("greedy_argmax", batch)](
            best, at, out, size, SPLITS=ARGMAX_SPLITS, num_warps=1, **pdl_options(logits)
        )
    return out
