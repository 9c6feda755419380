"""Weights of one byte: symmetric, with one scale for each output row."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmmamba_cli.ops.common import widened

LARGEST = 127


class Int8Weight(NamedTuple):
    """A weight (O, D) whose row o is scales[o] * values[o]: int8 (O, D) and fp32 (O,)."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def quantize(weight: Tensor) -> Int8Weight:
    """Round each row of a floating weight (O, D) to the nearest of 255 steps, -127 to 127.

    The largest magnitude of a row becomes 127, so that the error is at most half a scale; a row of
    zeros stays one.
    """
    wide = widened(weight.detach())
    scales = wide.abs().amax(1) / LARGEST
    steps = wide / torch.where(scales > 0, scales, 1).unsqueeze(1)
    values = steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return Int8Weight(values, scales.float())


def dequantize(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) in `dtype`, each product rounded once."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.values.device)
    scales = weight.scales.double() if dtype == torch.float64 else weight.scales
    return torch.mul(weight.values, scales.unsqueeze(1), out=out)
