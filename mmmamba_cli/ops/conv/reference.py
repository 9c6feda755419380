"""Causal depthwise convolution in plain PyTorch, on any device, with autograd.

Legend: B batch, T tokens, Ch channels, W taps. It is a sum of W shifted products; sum, bias and
activation are computed in fp32, or in fp64 for fp64 inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import compute_dtype, segment_ordinals


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
    batch, length, channels = x.shape
    past = weight.shape[1] - 1
    if initial_state is None:
        history = x.new_zeros(batch, past, channels)
    else:
        history = initial_state.to(x.dtype).mT
    segments = None if seq_idx is None else segment_ordinals(seq_idx, mask)
    if mask is None:
        inputs, segments = _after_history(history, x, segments)
        y = _sum_of_taps(inputs, weight, bias, activation, segments)
        return y, _last_inputs(inputs[:, length:], segments, past, None)

    # Move the padding of each row to its end, so that the real tokens are adjacent, and back.
    padding = ~mask.bool()
    order = padding.byte().argsort(dim=1, stable=True)
    x = _take_rows(x.masked_fill(padding.unsqueeze(-1), 0), order)
    if segments is not None:
        segments = segments.gather(1, order)
    inputs, segments = _after_history(history, x, segments)
    y = _take_rows(_sum_of_taps(inputs, weight, bias, activation, segments), order.argsort(dim=1))
    num_real = length - padding.sum(dim=1, keepdim=True)
    last = num_real + torch.arange(past, device=x.device)
    state = _last_inputs(_take_rows(inputs, last), segments, past, num_real)
    return y.masked_fill(padding.unsqueeze(-1), 0), state


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Compute `ops.causal_conv_step`; shapes as there."""
    window = torch.cat((state.to(x.dtype), x.unsqueeze(-1)), dim=-1)
    dtype = compute_dtype(x)
    y = (window.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return _activate(y, activation).to(x.dtype), window[..., 1:]


def _sum_of_taps(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    segments: Tensor | None,
) -> Tensor:
    """y (B, T, Ch) from inputs (B, W - 1 + T, Ch); taps do not cross sequences (`segments`)."""
    dtype = compute_dtype(inputs)
    past = weight.shape[1] - 1
    length = inputs.shape[1] - past
    wide, taps = inputs.to(dtype), weight.to(dtype).unbind(1)
    start = taps[past].new_zeros(()) if bias is None else bias.to(dtype)
    y = torch.addcmul(start, wide[:, past:], taps[past])
    for first in reversed(range(past)):
        shifted = wide[:, first : first + length]
        if segments is not None:
            foreign = segments[:, first : first + length] != segments[:, past:]
            shifted = shifted.masked_fill(foreign.unsqueeze(-1), 0)
        y = torch.addcmul(y, shifted, taps[first])
    return _activate(y, activation).to(inputs.dtype)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return F.silu(y) if activation == "silu" else y


def _after_history(
    history: Tensor, x: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x (B, T, Ch) and its segments after the W - 1 inputs of the past, which are in segment 0."""
    if segments is not None:
        segments = F.pad(segments, (history.shape[1], 0))
    return torch.cat((history, x), dim=1), segments


def _last_inputs(
    rows: Tensor, segments: Tensor | None, past: int, num_real: Tensor | None
) -> Tensor:
    """State (B, Ch, W - 1): the last W - 1 inputs, 0 where outside the last token's segment.

    `segments` (B, W - 1 + T) covers the past as well. `num_real` (B, 1) is the number of real
    tokens, which come first; None means T.
    """
    if segments is not None and past:
        if num_real is None:
            num_real = rows.new_full((rows.shape[0], 1), segments.shape[1] - past, dtype=torch.long)
        of_rows = segments.gather(1, num_real + torch.arange(past, device=rows.device))
        rows = rows.masked_fill((of_rows != of_rows[:, -1:]).unsqueeze(-1), 0)
    # Copy: a view in a cache would keep the inputs of the whole call alive.
    return rows.mT.clone(memory_format=torch.contiguous_format)


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Gather tokens `rows` (B, R) of x (B, T, Ch): (B, R, Ch)."""
    batch, length, _ = x.shape
    offsets = length * torch.arange(batch, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, (rows + offsets).flatten()).unflatten(0, rows.shape)
