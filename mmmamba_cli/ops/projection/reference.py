"""The fused linear layer in plain PyTorch, and symmetric int8 weights with one scale per row.

Rounds where a model's modules do: after the norm, the product, the activation and the sum.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.ops.norm import gated_rms_norm, rms_norm

# -128 is unused, so that the range is symmetric.
INT8_MAX = 127


class Int8Weight(NamedTuple):
    """A weight (O, D) whose row o is scales[o] * values[o]: int8 (O, D) and fp32 (O,)."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def quantize_rows(weight: Tensor) -> Int8Weight:
    """Quantize each row of a floating-point weight (O, D) to int8 in -127..127, round to nearest.

    The largest magnitude of a row maps to 127, so the error is at most half a scale. A row of zeros
    stays zero.
    """
    wide = upcast(weight.detach())
    scales = wide.abs().amax(1) / INT8_MAX
    steps = wide / torch.where(scales > 0, scales, 1).unsqueeze(1)
    values = steps.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return Int8Weight(values, scales.float())


def dequantize(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) in `dtype`; each element is rounded once."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.values.device)
    scales = weight.scales.double() if dtype == torch.float64 else weight.scales
    return torch.mul(weight.values, scales.unsqueeze(1), out=out)


def project(
    x: Tensor,
    weight: Tensor | Int8Weight,
    *,
    bias: Tensor | None,
    norm: Tensor | None,
    norm_dim: int | None,
    eps: float,
    gate: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    out: Tensor | None,
    inputs_ready: bool,
) -> Tensor:
    """Shapes as in `ops.project`; `inputs_ready` has no effect."""
    if norm_dim is not None:
        norm = x.new_ones(norm_dim)
    if gate is not None and norm is not None:
        heads = (-1, norm.shape[0])
        x = gated_rms_norm(x.unflatten(1, heads), gate.unflatten(1, heads), norm, eps).flatten(1)
    elif norm is not None:
        x = rms_norm(x, norm, eps)
    if isinstance(weight, Int8Weight):
        weight = dequantize(weight, x.dtype)
    y = F.linear(x, weight, bias)
    if swiglu:
        first, second = y.chunk(2, dim=1)
        y = F.silu(first) * second
    if residual is not None:
        y = residual + y
    return y if out is None else out.copy_(y)
