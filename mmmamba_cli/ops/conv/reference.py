"""Causal depthwise convolution in plain PyTorch: any device, autograd.

Legend: B batch, T tokens, Ch channels, W taps. A sum of W shifted products, taken in fp32, or in
fp64 for fp64 inputs, bias and activation included.
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
    """Shapes as in `ops.causal_conv`."""
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

    # Padding is moved behind the real tokens of its row, which makes these neighbours, and back.
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
    """Shapes as in `ops.causal_conv_step`."""
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
    """y (B, T, Ch) from inputs (B, W - 1 + T, Ch), with no tap across a change of `segments`."""
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
    """x (B, T, Ch) and its segments, behind W - 1 inputs of the past that belong to segment 0."""
    if segments is not None:
        segments = F.pad(segments, (history.shape[1], 0))
    return torch.cat((history, x), dim=1), segments


def _last_inputs(
    rows: Tensor, segments: Tensor | None, past: int, num_real: Tensor | None
) -> Tensor:
    """State (B, Ch, W - 1) from the last W - 1 inputs, zeros where they are of another segment.

    That is, of another than the last real token. `segments` (B, W - 1 + T) are those of all inputs,
    the first `num_real` (B, 1) after the past being real tokens; None stands for T.
    """
    if segments is not None and past:
        if num_real is None:
            num_real = rows.new_full((rows.shape[0], 1), segments.shape[1] - past, dtype=torch.long)
        of_rows = segments.gather(1, num_real + torch.arange(past, device=rows.device))
        rows = rows.masked_fill((of_rows != of_rows[:, -1:]).unsqueeze(-1), 0)
    # A copy: a view would keep the inputs of the whole call alive in a cache.
    return rows.mT.clone(memory_format=torch.contiguous_format)


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, T, Ch) at `rows` (B, R) of each batch entry, (B, R, Ch)."""
    batch, length, _ = x.shape
    offsets = length * torch.arange(batch, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, (rows + offsets).flatten()).unflatten(0, rows.shape)
