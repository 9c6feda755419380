"""The product of a few tokens in plain PyTorch: any device, autograd, any number of rows.

Rounds where a model's modules do: after the norm, the product, the activation and the sum.
"""

import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.norm import gated_rms_norm, rms_norm
from mmmamba_cli.ops.projection.int8 import Int8Weight, dequantize


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
    settled: bool,
) -> Tensor:
    """Shapes as in `ops.project`; `settled` or not, nothing is read ahead of time."""
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
