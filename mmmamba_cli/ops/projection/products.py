"""Linear layers of many tokens: cuBLAS products, with kernels for norm, gate and SwiGLU.

The residual sum is part of the product (`addmm`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.norm import gated_rms_norm, rms_norm
from mmmamba_cli.ops.projection import kernels
from mmmamba_cli.ops.projection.reference import Int8Weight, dequantize
from mmmamba_cli.ops.triton_utils import buffer, cdiv, check_inputs, device_guard

# Tile of the SwiGLU kernel in rows and columns of the result, and its warps.
BLOCK_R, BLOCK_D, WARPS = 4, 1024, 8


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
    """Shapes as in `ops.project`; no gradients. `inputs_ready` has no effect."""
    if norm_dim is not None:
        norm = x.new_ones(norm_dim)
    parts = tuple(weight) if isinstance(weight, Int8Weight) else (weight,)
    check_inputs("project", x, *parts, bias, norm, gate, residual, out)
    if gate is not None and norm is not None:
        heads = (-1, norm.shape[0])
        x = gated_rms_norm(
            x.unflatten(1, heads), gate.unflatten(1, heads), norm, eps, backend="triton"
        ).flatten(1)
    elif norm is not None:
        x = rms_norm(x, norm, eps, backend="triton")
    if isinstance(weight, Int8Weight):
        weight = dequantize(weight, x.dtype)
    if swiglu:
        y = _swiglu(F.linear(x, weight, bias))
        if residual is not None:
            return torch.add(residual, y, out=out)
        return y if out is None else out.copy_(y)
    if residual is None and (out is None or bias is not None):
        y = F.linear(x, weight, bias)
        return y if out is None else out.copy_(y)
    if residual is None:
        return torch.mm(x, weight.T, out=out)
    if bias is not None:
        residual = residual + bias
    return torch.addmm(residual, x, weight.T, out=out)


def _swiglu(y: Tensor) -> Tensor:
    """silu(first half) * second half of the rows of y (B, 2 * O), contiguous."""
    rows, size = y.shape[0], y.shape[1] // 2
    out = buffer(rows, size, like=y, dtype=y.dtype)
    with device_guard(y):
        kernels.swiglu[(cdiv(rows, BLOCK_R), cdiv(size, BLOCK_D))](
            y, out, rows, size, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=WARPS
        )
    return out
