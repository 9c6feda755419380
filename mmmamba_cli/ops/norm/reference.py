"""RMSNorm, plain and gated, in plain PyTorch, on any device, with autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.ops.backends import compute_dtype


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Shapes as in `ops.rms_norm`."""
    return (weight * _normalize(x, eps).to(x.dtype)).to(x.dtype)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Shapes as in `ops.gated_rms_norm`."""
    dtype = compute_dtype(y)
    normed = _normalize(y, eps) * weight.to(dtype)
    return (normed * F.silu(gate.to(dtype))).to(y.dtype)


def _normalize(x: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square over the last dimension, in fp32 or fp64."""
    x = x.to(compute_dtype(x))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
