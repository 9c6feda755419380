"""The scan on Triton kernels: four launches forward, six backward, two more where heads are shared.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim. Nothing of
size T is kept for the gradient but the inputs and five floats for each token and head; the state
of each span is, in fp32.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmamba_cli.ops.backends import segment_ordinals, wants_gradients
from mmmamba_cli.ops.ssd import kernels
from mmmamba_cli.ops.ssd.backward import Dots, Pairs, Tokens, decay_gradients, of_kv_heads
from mmmamba_cli.ops.ssd.launch_config import Launch, Sizes, Steps, plan
from mmmamba_cli.ops.triton_utils import (
    NATIVE,
    block,
    buffer,
    check_inputs,
    dense_rows,
    either,
    folded_grid,
    launch_grid,
    on_device,
)


class Role(NamedTuple):
    """A tensor (B, T, heads, dim) as q, k or v; `share` query heads read one of its heads."""

    tensor: Tensor
    share: int


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    D: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ops.ssd`; chunks have the length that suits the kernels, not `chunk_size`."""
    check_inputs("ssd", x, dt, A, B, C, dt_bias, D, initial_state)
    segments = None if seq_idx is None else segment_ordinals(seq_idx, mask).int()
    real = None if mask is None else mask.bool().contiguous().view(torch.uint8)
    given = (x, dt, A, B, C, dt_bias, D, initial_state)
    return _Scan.apply(*given, real, segments, dt_softplus, wants_gradients(*given))


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
        sizes = plan(x, B, C, trains)
        with on_device(x):
            steps = _prepare(sizes, dt, A, dt_bias, real, segments, softplus)
            key, value = Role(B, sizes.share), Role(x, sizes.share)
            states, decay = _span_states(sizes, key, value, steps, real, reverse=False)
            final = buffer(sizes.batch, sizes.heads, sizes.P, sizes.N, like=x)
            _pass_states(sizes, states, decay, initial_state, final)
            y = _outputs(
                sizes, sizes.tuning.forward, Role(C, 1), key, value, steps, states, real, segments,
                along="P", dtype=x.dtype, D=D,
            )  # fmt: skip
        ctx.save_for_backward(
            x, dt, A, B, C, dt_bias, D, initial_state, real, segments, states, final, *steps
        )
        ctx.sizes, ctx.softplus = sizes, softplus
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, dt_bias, D, initial, real, segments, states, final, *rest = (
            ctx.saved_tensors
        )
        sizes, steps = ctx.sizes, Steps._make(rest)
        dy = x.new_zeros(sizes.batch, sizes.length, sizes.heads, sizes.P) if dy is None else dy
        dy = dense_rows(dy)
        key, value, query, out = Role(B, sizes.share), Role(x, sizes.share), Role(C, 1), Role(dy, 1)
        with on_device(x):
            launch = sizes.tuning.backward
            dstates, decay = _span_states(sizes, query, out, steps, real, reverse=True)
            dinitial = buffer(sizes.batch, sizes.heads, sizes.P, sizes.N, like=x)
            products = _pass_states(sizes, dstates, decay, dfinal, dinitial, states, final)
            tokens, dots = Tokens(x, B, C, dy), Dots.empty(sizes, x)
            dC = _outputs(
                sizes, launch, out, value, key, steps, states, real, segments,
                along="N", dtype=C.dtype, own=query, dots=(dots.got, None),
            )  # fmt: skip
            dx = _outputs(
                sizes, launch, key, query, out, steps, dstates, real, segments,
                along="P", dtype=x.dtype, reverse=True, D=D, own=value,
                dots=(dots.gave, dots.direct),
            )  # fmt: skip
            pairs = Pairs.empty(sizes, x)
            dB = _outputs(
                sizes, launch, value, out, query, steps, dstates, real, segments,
                along="N", dtype=B.dtype, reverse=True, own=key, pairs=pairs,
            )  # fmt: skip
            ddt, dA, dbias, dD = decay_gradients(
                sizes, (dt, A, dt_bias), tokens, steps, real, segments,
                dots, pairs, products, ctx.softplus,
            )  # fmt: skip
            dx, dB = of_kv_heads(dx, sizes), of_kv_heads(dB, sizes)
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


def _prepare(
    sizes: Sizes,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    real: Tensor | None,
    segments: Tensor | None,
    softplus: bool,
) -> Steps:
    shape = (sizes.batch, sizes.heads)
    of_tokens = [buffer(*shape, sizes.padded, like=dt) for _ in range(5)]
    steps = Steps._make([*of_tokens, buffer(*shape, sizes.chunks, like=dt)])
    heads = min(block(sizes.heads, 1), 16)
    grid = launch_grid("ssd", sizes.chunks, sizes.batch, triton.cdiv(sizes.heads, heads))
    kernels.prepare[grid](
        dt, A.contiguous(), either(dt_bias, A), either(real, A), either(segments, A), *steps,
        sizes.length, sizes.heads, sizes.padded, *dt.stride(),
        SOFTPLUS=softplus, HAS_BIAS=dt_bias is not None, HAS_MASK=real is not None,
        HAS_SEGMENTS=segments is not None, Q=sizes.tuning.chunk, BLOCK_H=heads, num_warps=4,
    )  # fmt: skip
    return steps


def _span_states(
    sizes: Sizes,
    key: Role,
    value: Role,
    steps: Steps,
    real: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """What each span adds to the state, (B, spans, H, P, N), and its decay (B, spans, H)."""
    batch, heads = sizes.batch, sizes.heads
    like = key.tensor
    states = buffer(batch, sizes.spans, heads, sizes.P, sizes.N, like=like)
    decay = buffer(batch, sizes.spans, heads, like=like)
    launch = sizes.states
    tile = min(launch.tile, block(sizes.P))
    grid, folded = folded_grid("ssd", triton.cdiv(sizes.P, tile) * heads, sizes.spans, batch)
    kernels.span_states[grid](
        key.tensor, value.tensor, either(real, like), steps.step,
        steps.from_start if reverse else steps.to_end, steps.through, states, decay,
        sizes.length, heads, sizes.padded, sizes.spans, sizes.per_span,
        *key.tensor.stride()[:3], *value.tensor.stride()[:3], 1, sizes.N,
        K_SHARE=key.share, V_SHARE=value.share, K_DIM=sizes.N, V_DIM=sizes.P,
        BLOCK_K=block(sizes.N), BLOCK_V=tile, Q=sizes.tuning.chunk, REVERSE=reverse,
        HAS_MASK=real is not None, DTYPE=sizes.dtype, PRECISION="tf32x3",
        num_warps=launch.warps, num_stages=launch.stages, **folded,
    )  # fmt: skip
    return states, decay


STATE_BLOCK = 1024


def _pass_states(
    sizes: Sizes,
    states: Tensor,
    decay: Tensor,
    first: Tensor | None,
    last: Tensor,
    entering: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """Run `kernels.pass_states` in place, in reverse if there are states `entering` the spans."""
    size = sizes.P * sizes.N
    blocks = triton.cdiv(size, STATE_BLOCK)
    products = buffer(sizes.batch, sizes.spans, sizes.heads, blocks, like=states)
    kernels.pass_states[launch_grid("ssd", blocks * sizes.batch * sizes.heads)](
        states, decay, states if first is None else first.contiguous(), last,
        either(entering, states), either(final, states), products,
        sizes.heads, sizes.spans, size, blocks,
        HAS_FIRST=first is not None, REVERSE=entering is not None, SINGLE=sizes.per_span == 1,
        BLOCK=STATE_BLOCK, num_warps=4,
    )  # fmt: skip
    return products


def _outputs(
    sizes: Sizes,
    launch: Launch,
    query: Role,
    key: Role,
    value: Role,
    steps: Steps,
    states: Tensor,
    real: Tensor | None,
    segments: Tensor | None,
    *,
    along: str,
    dtype: torch.dtype,
    reverse: bool = False,
    D: Tensor | None = None,
    own: Role | None = None,
    dots: tuple[Tensor | None, Tensor | None] = (None, None),
    pairs: Pairs | None = None,
) -> Tensor:
    """`kernels.span_outputs` (B, T, H, P) or (B, T, H, N), whichever `along` says."""
    batch, length, heads = sizes.batch, sizes.length, sizes.heads
    # A state lies as (P, N): for outputs along N the keys are values of the scan.
    key_dim, dim = (sizes.N, sizes.P) if along == "P" else (sizes.P, sizes.N)
    state_strides = (1, sizes.N) if along == "P" else (sizes.N, 1)
    out = buffer(batch, length, heads, dim, like=states, dtype=dtype)
    tile = min(launch.tile, block(dim))
    own = query if own is None else own
    inter, whole = dots
    grid, folded = folded_grid("ssd", triton.cdiv(dim, tile) * heads, sizes.spans, batch)
    kernels.span_outputs[grid](
        query.tensor, key.tensor, value.tensor, own.tensor, either(real, states),
        either(segments, states), *steps, states, either(D, states), out,
        either(inter, states), either(whole, states),
        *((states, states) if pairs is None else pairs),
        length, heads, sizes.padded, sizes.spans, sizes.per_span,
        *query.tensor.stride()[:3], *key.tensor.stride()[:3], *value.tensor.stride()[:3],
        *own.tensor.stride()[:3], *state_strides,
        Q_SHARE=query.share, K_SHARE=key.share, V_SHARE=value.share, OWN_SHARE=own.share,
        K_DIM=key_dim, V_DIM=dim, BLOCK_K=block(key_dim), BLOCK_V=tile,
        Q=sizes.tuning.chunk, REVERSE=reverse, WEIGH_K=reverse == (along == "P"),
        DOTS=2 if whole is not None else int(inter is not None), PAIRS=pairs is not None,
        HAS_D=D is not None, HAS_MASK=real is not None, HAS_SEGMENTS=segments is not None,
        DTYPE=sizes.dtype, PRECISION="tf32x3", NATIVE=NATIVE,
        num_warps=launch.warps, num_stages=launch.stages, **folded,
    )  # fmt: skip
    return out
