"""A linear layer with the norm before it and the activation or sum behind it, without gradients.

A decoding step reads every weight once and does little else, so with a few tokens whatever stands
between two products is done by the product itself. Legend: B rows (tokens), D input size, O rows of
the weight, P head dim.
"""

from typing import Protocol

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, kernel_backends, pick_backend, suits_triton
from mmmamba_cli.ops.projection import reference
from mmmamba_cli.ops.projection.reference import Int8Weight, dequantize, quantize

__all__ = [
    "PROJECT_BACKENDS",
    "Int8Weight",
    "dequantize",
    "project",
    "quantize",
]


class ProjectBackend(Protocol):
    """What `project` hands to a backend: its own arguments, checked."""

    def __call__(
        self,
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
    ) -> Tensor: ...


PROJECT_BACKENDS: dict[str, ProjectBackend] = {
    "reference": reference.project,
    **kernel_backends("projection", "project"),
    **kernel_backends("projection", "project", name="products", module="products"),
}
# With more, each weight is used often enough that matrix products on tensor cores win: seen on an
# H100 from 4 rows on. int8 has no such product, and would be widened first.
MOST_TRITON_ROWS, MOST_INT8_ROWS = 2, 8


def project(
    x: Tensor,
    weight: Tensor | Int8Weight,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    norm_dim: int | None = None,
    eps: float = 0.0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    out: Tensor | None = None,
    settled: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x times the weight transposed, for decoding: act(prologue(x) W^T + bias) + residual.

    Args:
        x: (B, D); rows may lie apart in memory, as those of a slice do.
        weight: (O, D) in x's dtype, or int8 with a scale for each row.
        bias: (O,).
        norm: weights of the RMS norm that x goes through first: (D,), or with `gate` (P,), P
            dividing D: then each head of P is normed and gated as `gated_rms_norm` does it.
        norm_dim: how many numbers are normed together where `norm` is None: D, or with `gate` P;
            weights were multiplied into `weight` before.
        eps: added to the mean square.
        gate: (B, D), before SiLU; only with `norm` or `norm_dim`.
        residual: added at the end, of the result's shape.
        swiglu: whether the rows of the weight are two halves of O / 2 and the result is
            silu(first) * second.
        out: where to write the result; it may be `residual`, but not x.
        settled: whether `gate` was written before the launch that made x: a kernel that takes all
            inputs at once then reads it while that one still runs.
        backend: "reference"; "triton", for few rows, and "products", for many, which have no
            gradient; or "auto": on a GPU, if Triton is installed, nothing is fp64 and no gradient
            is wanted, triton for at most 2 rows (8 of an int8 weight) and products for more.

    Returns:
        (B, O), or (B, O / 2) with `swiglu`, in x's dtype. The reference rounds wherever the modules
        of a model do, triton sums in fp32 and rounds once, at the end, and products once for each
        of norm, product with its sum, and activation.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    _check(x, weight, bias, norm, norm_dim, gate, swiglu)
    num_rows = weight.shape[0] // 2 if swiglu else weight.shape[0]
    check_shape("project", "residual", residual, (x.shape[0], num_rows))
    check_shape("project", "out", out, (x.shape[0], num_rows))
    if backend == "auto":
        head_dim = None if gate is None else _normed_together(norm, norm_dim)
        backend = _chosen(x, weight, bias, norm, gate, residual, head_dim)
    found = pick_backend("project", backend, PROJECT_BACKENDS)
    return found(
        x,
        weight,
        bias=bias,
        norm=norm,
        norm_dim=norm_dim,
        eps=eps,
        gate=gate,
        residual=residual,
        swiglu=swiglu,
        out=out,
        settled=settled,
    )


def _chosen(
    x: Tensor,
    weight: Tensor | Int8Weight,
    bias: Tensor | None,
    norm: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    head_dim: int | None,
) -> str:
    parts = tuple(weight) if isinstance(weight, Int8Weight) else (weight,)
    tensors = [t for t in (x, *parts, bias, norm, gate, residual) if t is not None]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if "triton" not in PROJECT_BACKENDS or not len(x) or learns or not suits_triton(*tensors):
        return "reference"
    most = MOST_INT8_ROWS if isinstance(weight, Int8Weight) else MOST_TRITON_ROWS
    # Heads fill a program's tile if there is a power of two in each.
    few = x.shape[0] <= most and (head_dim is None or head_dim.bit_count() == 1)
    return "triton" if few else "products"


def _normed_together(norm: Tensor | None, norm_dim: int | None) -> int | None:
    return norm_dim if norm is None else norm.numel()


def _check(
    x: Tensor,
    weight: Tensor | Int8Weight,
    bias: Tensor | None,
    norm: Tensor | None,
    norm_dim: int | None,
    gate: Tensor | None,
    swiglu: bool,
) -> None:
    shape = tuple(weight.shape)
    if x.dim() != 2 or len(shape) != 2 or shape[1] != x.shape[1]:
        raise ValueError(
            f"project: x is {tuple(x.shape)} and weight {shape}, expected (B, D) and (O, D)"
        )
    if swiglu and shape[0] % 2:
        raise ValueError(f"project: {shape[0]} rows of the weight are not two halves, for SwiGLU")
    check_shape("project", "bias", bias, shape[:1])
    check_shape("project", "gate", gate, tuple(x.shape))
    if norm is not None and norm_dim is not None:
        raise ValueError("project: norm and norm_dim are both given, expected one of them")
    if gate is None:
        _check_norm(norm, norm_dim, shape[1])
    else:
        _check_head_norm(norm, norm_dim, shape[1])


def _check_norm(norm: Tensor | None, norm_dim: int | None, dim: int) -> None:
    check_shape("project", "norm", norm, (dim,))
    if norm_dim not in (None, dim):
        raise ValueError(f"project: norm_dim is {norm_dim}, expected {dim}")


def _check_head_norm(norm: Tensor | None, norm_dim: int | None, dim: int) -> None:
    if norm_dim is not None:
        if norm_dim < 1 or dim % norm_dim:
            raise ValueError(f"project: norm_dim is {norm_dim}, expected a divisor of {dim}")
    elif norm is None or norm.dim() != 1 or not norm.numel() or dim % norm.numel():
        found = None if norm is None else tuple(norm.shape)
        raise ValueError(
            f"project: norm is {found}, expected (P,), P a divisor of {dim}, or norm_dim"
        )
