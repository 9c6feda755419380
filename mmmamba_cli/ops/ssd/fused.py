"""The scan on Triton kernels: four launches forward, six backward, eight with grouped heads.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim. A span is a
run of consecutive chunks that one program processes. Saved for the backward pass are the inputs,
five fp32 numbers per token and head, and the state at the start of each span in fp32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmamba_cli.ops.backends import segment_ordinals
from mmmamba_cli.ops.ssd import kernels
from mmmamba_cli.ops.ssd.backward import PairSums, StateDots, Tokens, decay_gradients, sum_groups
from mmmamba_cli.ops.ssd.launch_config import Decays, Launch, ScanPlan, plan_scan
from mmmamba_cli.ops.ssd.reference import ScanInputs
from mmmamba_cli.ops.triton_utils import (
    USE_PTX,
    block_size,
    buffer,
    cdiv,
    check_inputs,
    dense_rows,
    device_guard,
    folded_grid,
    launch_grid,
    or_dummy,
)

# State elements per program of `kernels.pass_states`.
STATE_BLOCK = 1024


class Operand(NamedTuple):
    """A tensor (B, T, heads, dim) used as q, k or v of the decayed attention in `kernels.py`.

    `group_size` query heads share one of its heads.
    """

    tensor: Tensor
    group_size: int


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run `ops.ssd` with the kernels' own chunk size instead of `inputs.chunk_size`."""
    tensors, mask = inputs.float_tensors, inputs.mask
    check_inputs("ssd", *tensors)
    segments = None
    if inputs.seq_idx is not None:
        segments = segment_ordinals(inputs.seq_idx, mask).int()
    real = None if mask is None else mask.bool().contiguous().view(torch.uint8)
    return _Scan.apply(*tensors, real, segments, inputs.dt_softplus, inputs.needs_grad)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        D: Tensor | None,
        initial_state: Tensor | None,
        real: Tensor | None,
        segments: Tensor | None,
        softplus: bool,
        trains: bool,
    ) -> tuple[Tensor, Tensor]:
        x, B, C = dense_rows(x), dense_rows(B), dense_rows(C)
        plan = plan_scan(x, B, C, trains)
        with device_guard(x):
            decays = _prepare_decays(plan, dt, A, dt_bias, real, segments, softplus)
            key, value = Operand(B, plan.group_size), Operand(x, plan.group_size)
            states, decay = _span_states(plan, key, value, decays, real, reverse=False)
            final = buffer(plan.batch, plan.heads, plan.P, plan.N, like=x)
            _pass_states(plan, states, decay, initial_state, final)
            y = _outputs(
                plan, plan.tuning.forward, Operand(C, 1), key, value, decays, states, real,
                segments, along="P", dtype=x.dtype, D=D,
            )  # fmt: skip
        ctx.save_for_backward(
            x, dt, A, B, C, dt_bias, D, initial_state, real, segments, states, final, *decays
        )
        ctx.plan, ctx.softplus = plan, softplus
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, dt_bias, D, initial, real, segments, states, final, *rest = (
            ctx.saved_tensors
        )
        plan, decays = ctx.plan, Decays._make(rest)
        dy = x.new_zeros(plan.batch, plan.length, plan.heads, plan.P) if dy is None else dy
        dy = dense_rows(dy)
        key, value = Operand(B, plan.group_size), Operand(x, plan.group_size)
        query, out = Operand(C, 1), Operand(dy, 1)
        with device_guard(x):
            launch = plan.tuning.backward
            dstates, decay = _span_states(plan, query, out, decays, real, reverse=True)
            dinitial = buffer(plan.batch, plan.heads, plan.P, plan.N, like=x)
            products = _pass_states(plan, dstates, decay, dfinal, dinitial, states, final)
            tokens, dots = Tokens(x, B, C, dy), StateDots.empty(plan, x)
            dC = _outputs(
                plan, launch, out, value, key, decays, states, real, segments,
                along="N", dtype=C.dtype, own=query, dots=(dots.read, None),
            )  # fmt: skip
            dx = _outputs(
                plan, launch, key, query, out, decays, dstates, real, segments,
                along="P", dtype=x.dtype, reverse=True, D=D, own=value,
                dots=(dots.written, dots.direct),
            )  # fmt: skip
            pairs = PairSums.empty(plan, x)
            dB = _outputs(
                plan, launch, value, out, query, decays, dstates, real, segments,
                along="N", dtype=B.dtype, reverse=True, own=key, pairs=pairs,
            )  # fmt: skip
            ddt, dA, dbias, dD = decay_gradients(
                plan, (dt, A, dt_bias), tokens, decays, real, segments,
                dots, pairs, products, ctx.softplus,
            )  # fmt: skip
            dx, dB = sum_groups(dx, plan), sum_groups(dB, plan)
        return (
            dx,
            ddt,
            dA.to(A.dtype),
            dB,
            dC,
            None if dt_bias is None else dbias.to(dt_bias.dtype),
            None if D is None else dD.to(D.dtype),
            None if initial is None else dinitial.to(initial.dtype),
            None,
            None,
            None,
            None,
        )


def _prepare_decays(
    plan: ScanPlan,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    real: Tensor | None,
    segments: Tensor | None,
    softplus: bool,
) -> Decays:
    """Launch `kernels.prepare_decays`; `real` (B, T) is the mask, `segments` are ordinals."""
    shape = (plan.batch, plan.heads)
    per_token = [buffer(*shape, plan.padded, like=dt) for _ in range(5)]
    decays = Decays._make([*per_token, buffer(*shape, plan.chunks, like=dt)])
    heads = min(block_size(plan.heads, 1), 16)
    grid = launch_grid("ssd", plan.chunks, plan.batch, cdiv(plan.heads, heads))
    kernels.prepare_decays[grid](
        dt, A.contiguous(), or_dummy(dt_bias, A), or_dummy(real, A), or_dummy(segments, A), *decays,
        plan.length, plan.heads, plan.padded, *dt.stride(),
        SOFTPLUS=softplus, HAS_BIAS=dt_bias is not None, HAS_MASK=real is not None,
        HAS_SEGMENTS=segments is not None, Q=plan.tuning.chunk, BLOCK_H=heads, num_warps=4,
    )  # fmt: skip
    return decays


def _span_states(
    plan: ScanPlan,
    key: Operand,
    value: Operand,
    decays: Decays,
    real: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Each span's contribution to the state, (B, spans, H, P, N), and its decay (B, spans, H)."""
    batch, heads = plan.batch, plan.heads
    like = key.tensor
    states = buffer(batch, plan.spans, heads, plan.P, plan.N, like=like)
    decay = buffer(batch, plan.spans, heads, like=like)
    launch = plan.states
    tile = min(launch.tile, block_size(plan.P))
    grid, folded = folded_grid("ssd", cdiv(plan.P, tile) * heads, plan.spans, batch)
    kernels.span_states[grid](
        key.tensor, value.tensor, or_dummy(real, like), decays.step,
        decays.from_start if reverse else decays.to_end, decays.chunk_decay, states, decay,
        plan.length, heads, plan.padded, plan.spans, plan.per_span,
        *key.tensor.stride()[:3], *value.tensor.stride()[:3], 1, plan.N,
        K_GROUP=key.group_size, V_GROUP=value.group_size, K_DIM=plan.N, V_DIM=plan.P,
        BLOCK_K=block_size(plan.N), BLOCK_V=tile, Q=plan.tuning.chunk, REVERSE=reverse,
        HAS_MASK=real is not None, DTYPE=plan.dtype, PRECISION="tf32x3",
        num_warps=launch.warps, num_stages=launch.stages, **folded,
    )  # fmt: skip
    return states, decay


def _pass_states(
    plan: ScanPlan,
    states: Tensor,
    decay: Tensor,
    first: Tensor | None,
    last: Tensor,
    entering: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """Turn contributions `states` of spans into their initial states, in place.

    `first` (B, H, P, N) or None is the state before the first span, `last` receives the one after
    the last. With `entering`, the forward pass's initial states, it runs in reverse on gradients.
    Returns the products of gradient and state at the end of each span, (B, spans, H, blocks); they
    are valid in reverse only.
    """
    size = plan.P * plan.N
    blocks = cdiv(size, STATE_BLOCK)
    products = buffer(plan.batch, plan.spans, plan.heads, blocks, like=states)
    kernels.pass_states[launch_grid("ssd", blocks * plan.batch * plan.heads)](
        states, decay, states if first is None else first.contiguous(), last,
        or_dummy(entering, states), or_dummy(final, states), products,
        plan.heads, plan.spans, size, blocks,
        HAS_FIRST=first is not None, REVERSE=entering is not None, ONE_CHUNK=plan.per_span == 1,
        BLOCK=STATE_BLOCK, num_warps=4,
    )  # fmt: skip
    return products


def _outputs(
    plan: ScanPlan,
    launch: Launch,
    query: Operand,
    key: Operand,
    value: Operand,
    decays: Decays,
    states: Tensor,
    real: Tensor | None,
    segments: Tensor | None,
    *,
    along: str,
    dtype: torch.dtype,
    reverse: bool = False,
    D: Tensor | None = None,
    own: Operand | None = None,
    dots: tuple[Tensor | None, Tensor | None] = (None, None),
    pairs: PairSums | None = None,
) -> Tensor:
    """Launch `kernels.span_outputs`: (B, T, H, P) if `along` is "P", else (B, T, H, N).

    `states` are the spans' initial states, of gradients if `reverse`. `own`, `dots` and `pairs`
    are the operand and the outputs of the reductions for `decay_gradients`.
    """
    batch, length, heads = plan.batch, plan.length, plan.heads
    # States are stored as (P, N). For outputs along N, the kernel's keys are x or dy of dim P.
    key_dim, dim = (plan.N, plan.P) if along == "P" else (plan.P, plan.N)
    state_strides = (1, plan.N) if along == "P" else (plan.N, 1)
    out = buffer(batch, length, heads, dim, like=states, dtype=dtype)
    tile = min(launch.tile, block_size(dim))
    own = query if own is None else own
    state_dot, total_dot = dots
    grid, folded = folded_grid("ssd", cdiv(dim, tile) * heads, plan.spans, batch)
    kernels.span_outputs[grid](
        query.tensor, key.tensor, value.tensor, own.tensor, or_dummy(real, states),
        or_dummy(segments, states), *decays, states, or_dummy(D, states), out,
        or_dummy(state_dot, states), or_dummy(total_dot, states),
        *((states, states) if pairs is None else pairs),
        length, heads, plan.padded, plan.spans, plan.per_span,
        *query.tensor.stride()[:3], *key.tensor.stride()[:3], *value.tensor.stride()[:3],
        *own.tensor.stride()[:3], *state_strides,
        Q_GROUP=query.group_size, K_GROUP=key.group_size, V_GROUP=value.group_size,
        OWN_GROUP=own.group_size,
        K_DIM=key_dim, V_DIM=dim, BLOCK_K=block_size(key_dim), BLOCK_V=tile,
        Q=plan.tuning.chunk, REVERSE=reverse, SCALE_K=reverse == (along == "P"),
        DOTS=2 if total_dot is not None else int(state_dot is not None), PAIRS=pairs is not None,
        HAS_D=D is not None, HAS_MASK=real is not None, HAS_SEGMENTS=segments is not None,
        DTYPE=plan.dtype, PRECISION="tf32x3", USE_PTX=USE_PTX,
        num_warps=launch.warps, num_stages=launch.stages, **folded,
    )  # fmt: skip
    return out
