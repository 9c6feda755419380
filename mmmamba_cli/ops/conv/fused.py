"""The convolution on Triton kernels, with bias and SiLU: one launch forward, one backward.

Legend: B batch, T tokens, Ch channels, W taps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmamba_cli.ops.backends import segment_ordinals
from mmmamba_cli.ops.conv import kernels
from mmmamba_cli.ops.triton_utils import (
    buffer,
    cdiv,
    check_inputs,
    dense_rows,
    device_guard,
    folded_grid,
)

# Tokens and channels per program, and num_warps: the fastest of 14 on an H100 for 4096 channels.
BLOCK_T, BLOCK_C, NUM_WARPS = 32, 64, 4


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute `ops.causal_conv`; shapes as there."""
    check_inputs("causal_conv", x, weight, bias, initial_state)
    segments = None if seq_idx is None else segment_ordinals(seq_idx, mask).int()
    silu = activation == "silu"
    first = None if initial_state is None else initial_state.to(x.dtype)
    if mask is None:
        y = _Conv.apply(x, weight, bias, first, segments, silu)
        return y, _last_inputs(x, first, segments, weight.shape[1] - 1, None)

    # Move the padding of each row to its end, so that the real tokens are adjacent, and back.
    padding = ~mask.bool()
    order = padding.byte().argsort(dim=1, stable=True)
    x = _take_rows(x.masked_fill(padding.unsqueeze(-1), 0), order)
    if segments is not None:
        segments = segments.gather(1, order)
    y = _Conv.apply(x, weight, bias, first, segments, silu)
    num_real = x.shape[1] - padding.sum(dim=1, keepdim=True)
    state = _last_inputs(x, first, segments, weight.shape[1] - 1, num_real)
    y = _take_rows(y, order.argsort(dim=1))
    return y.masked_fill(padding.unsqueeze(-1), 0), state


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: Tensor | None,
        segments: Tensor | None,
        silu: bool,
    ) -> Tensor:
        x, weight = dense_rows(x), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        first = None if first is None else first.contiguous()
        segments = None if segments is None else segments.contiguous()
        y = buffer(*x.shape, like=x, dtype=x.dtype)
        batch, length, channels = x.shape
        blocks = cdiv(channels, BLOCK_C)
        grid, folded = folded_grid("causal_conv", blocks, cdiv(length, BLOCK_T), batch)
        with device_guard(x):
            kernels.convolve[grid](
                *_pointers(x, first, weight, bias, segments), y, length, channels,
                *x.stride()[:2],
                W=weight.shape[1], **_options(first, bias, segments, silu), **folded,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, first, segments)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, first, segments = ctx.saved_tensors
        dy = dense_rows(dy)
        batch, length, channels = x.shape
        taps = weight.shape[1]
        programs = cdiv(length + taps - 1, BLOCK_T)
        dx = buffer(*x.shape, like=x, dtype=x.dtype)
        dfirst = buffer(batch, channels, taps - 1, like=x) if first is not None else None
        dweight = buffer(batch * programs, channels, taps, like=x)
        dbias = buffer(batch * programs, channels, like=x) if bias is not None else None
        blocks = cdiv(channels, BLOCK_C)
        grid, folded = folded_grid("causal_conv", blocks, programs, batch)
        with device_guard(x):
            kernels.gradients[grid](
                *_pointers(x, first, weight, bias, segments), dy, dx,
                x if dfirst is None else dfirst, dweight, x if dbias is None else dbias,
                length, channels, *x.stride()[:2], *dy.stride()[:2],
                W=taps, **_options(first, bias, segments, ctx.silu), **folded,
            )  # fmt: skip
        return (
            dx,
            dweight.sum(0).to(weight.dtype),
            None if dbias is None else dbias.sum(0).to(bias.dtype),
            None if dfirst is None else dfirst.to(first.dtype),
            None,
            None,
        )


def _pointers(x: Tensor, *others: Tensor | None) -> list[Tensor]:
    """x and the others, with x as a dummy pointer for those that are None."""
    return [x, *(x if tensor is None else tensor for tensor in others)]


def _options(
    first: Tensor | None, bias: Tensor | None, segments: Tensor | None, silu: bool
) -> dict[str, Any]:
    return {
        "SILU": silu,
        "HAS_FIRST": first is not None and first.numel() > 0,
        "HAS_BIAS": bias is not None,
        "HAS_SEGMENTS": segments is not None,
        "BLOCK_T": BLOCK_T,
        "BLOCK_C": BLOCK_C,
        "num_warps": NUM_WARPS,
    }


def _last_inputs(
    x: Tensor,
    first: Tensor | None,
    segments: Tensor | None,
    past: int,
    num_real: Tensor | None,
) -> Tensor:
    """State (B, Ch, W - 1): the last W - 1 inputs, 0 where outside the last token's segment.

    The inputs are `first` (B, Ch, W - 1) or zeros, then the first `num_real` (B, 1) tokens of x, or
    all T if that is None.
    """
    batch, length, _ = x.shape
    if num_real is None and segments is None and 0 < past <= length:
        # Fast path of prefill: one launch instead of a dozen.
        return x[:, -past:].mT.clone(memory_format=torch.contiguous_format)
    if num_real is None:
        num_real = torch.full((batch, 1), length, dtype=torch.long, device=x.device)
    times = num_real + torch.arange(-past, 0, device=x.device)
    within = times.clamp(min=0)
    rows = _take_rows(x, within)
    before = (times < 0).unsqueeze(-1)
    if first is None:
        rows = rows.masked_fill(before, 0)
    elif past:
        old = _take_rows(first.mT, (times + past).clamp(max=past - 1))
        rows = torch.where(before, old, rows)
    if segments is not None and past:
        of_rows = F.pad(segments, (past, 0)).gather(1, times + past)
        rows = rows.masked_fill((of_rows != of_rows[:, -1:]).unsqueeze(-1), 0)
    return rows.mT.clone(memory_format=torch.contiguous_format)


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Gather tokens `rows` (B, R) of x (B, T, Ch): (B, R, Ch)."""
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[2]))
