"""RMSNorm on Triton kernels, plain and gated: one launch forward, one backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmamba_cli.ops.norm import kernels
from mmmamba_cli.ops.triton_utils import block_size, buffer, cdiv, check_inputs, device_guard

# Elements of each tensor that a program holds, and its num_warps.
BLOCK_ELEMENTS, NUM_WARPS = 4096, 4
# Maximum programs of the backward pass, each of which writes one partial weight gradient: eight on
# each of an H100's 132 SMs.
MAX_BACKWARD_PROGRAMS = 1056


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Shapes as in `ops.gated_rms_norm`."""
    check_inputs("gated_rms_norm", y, gate, weight)
    return _Norm.apply(y, gate, weight, eps)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Shapes as in `ops.rms_norm`."""
    check_inputs("rms_norm", x, weight)
    return _Norm.apply(x, None, weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        gate, heads, gate_t = (None, 1, 0) if gate is None else _gate_layout(gate)
        out = buffer(*x.shape, like=x, dtype=x.dtype)
        num_rows = x.numel() // x.shape[-1]
        with device_guard(x):
            kernels.norm[_grid(num_rows, x.shape[-1])](
                x, x if gate is None else gate, weight, out, num_rows, eps, gate_t,
                HEADS=heads, GATED=gate is not None, **_block_options(x.shape[-1]),
            )  # fmt: skip
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        gate = None if gate is None else gate.contiguous()
        dim = x.shape[-1]
        num_rows = x.numel() // dim
        grid = (min(*_grid(num_rows, dim), MAX_BACKWARD_PROGRAMS),)
        dx = buffer(*x.shape, like=x, dtype=x.dtype)
        dgate = None if gate is None else buffer(*x.shape, like=x, dtype=gate.dtype)
        dweight = buffer(*grid, dim, like=x)
        with device_guard(x):
            kernels.gradients[grid](
                x, x if gate is None else gate, weight, dout.contiguous(), dx,
                x if dgate is None else dgate, dweight, num_rows, ctx.eps,
                GATED=gate is not None, **_block_options(dim),
            )  # fmt: skip
        return dx, dgate, dweight.sum(0).to(weight.dtype), None


def _gate_layout(gate: Tensor) -> tuple[Tensor, int, int]:
    """The gate (..., H, P), the number of contiguous rows per token, and the stride of a token.

    A slice (B, T, H, P) of a packed projection is read in place; other non-contiguous gates are
    copied.
    """
    dim = gate.shape[-1]
    if gate.dim() > 2 and gate.stride(-1) == 1 and gate.stride(-2) == dim:
        try:
            flat = gate.view(-1, *gate.shape[-2:])
        except RuntimeError:  # The tokens have no common stride.
            return gate.contiguous(), 1, dim
        return gate, gate.shape[-2], flat.stride(0)
    return gate.contiguous(), 1, dim


def _block_options(dim: int) -> dict[str, int]:
    size = block_size(dim, 1)
    return {
        "D": dim,
        "BLOCK_R": max(1, BLOCK_ELEMENTS // size),
        "BLOCK_D": size,
        "num_warps": NUM_WARPS,
    }


def _grid(num_rows: int, dim: int) -> tuple[int]:
    return (cdiv(num_rows, _block_options(dim)["BLOCK_R"]),)
