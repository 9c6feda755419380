"""A linear layer fused with the norm in front of it and the activation or residual sum behind it.

With few tokens a decoding step is bound by reading the weights, so the elementwise work between
two products is fused into them. Legend: B rows (tokens), D input size, O rows of the weight, P head
dim.
"""

from typing import Protocol

from torch import Tensor

from mmmamba_cli.ops.backends import (
    check_shape,
    get_backend,
    needs_grad,
    optional_backend,
    supports_triton,
)
from mmmamba_cli.ops.projection import reference
from mmmamba_cli.ops.projection.reference import Int8Weight, dequantize, quantize_rows

__all__ = [
    "PROJECT_BACKENDS",
    "Int8Weight",
    "dequantize",
    "project",
    "quantize_rows",
]


class ProjectBackend(Protocol):
    """Signature of a backend: the validated arguments of `project`."""

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
        inputs_ready: bool,
    ) -> Tensor: ...


PROJECT_BACKENDS: dict[str, ProjectBackend] = {
    "reference": reference.project,
    **optional_backend("triton", f"{__package__}.fused", "project"),
    **optional_backend("products", f"{__package__}.products", "project"),
}
# Most rows for the fused kernel; with more, tensor cores win (measured on an H100 from 4 rows on).
# int8 weights would have to be dequantized for tensor cores first.
MAX_TRITON_ROWS, MAX_TRITON_INT8_ROWS = 2, 8


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
    inputs_ready: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Fused linear layer for decoding: act(norm(x) W^T + bias) + residual.

    Args:
        x: (B, D); only the last dimension has to be contiguous, as in a slice.
        weight: (O, D) in x's dtype, or int8 with a scale for each row.
        bias: (O,).
        norm: weight of the RMSNorm applied to x: (D,), or with `gate` (P,), P dividing D: each head
            of P is then normalized and gated as in `gated_rms_norm`.
        norm_dim: with `norm` None, apply an RMSNorm without weight over this many elements: D, or
            with `gate` P. For norms whose weight is folded into `weight`.
        eps: epsilon of the norm.
        gate: (B, D), before SiLU; only with `norm` or `norm_dim`.
        residual: added last, in the shape of the result.
        swiglu: apply silu(first) * second to the two halves of the weight's rows, O / 2 each.
        out: tensor to write the result to; may be `residual`, but not x.
        inputs_ready: whether `gate` was written before the launch that made x. A kernel that loads
            a whole row at once then reads it while that launch still runs.
        backend: "reference"; "triton" for few rows or "products" for many (no gradients); or
            "auto": on a GPU, if Triton is installed, no tensor is fp64 and none requires a
            gradient, triton for at most 2 rows (8 with an int8 weight) and products for more.

    Returns:
        (B, O), or (B, O / 2) with `swiglu`, in x's dtype. The reference rounds where a model's
        modules do; triton accumulates in fp32 and rounds once; products rounds after the norm,
        after the product with its sum, and after the activation.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    _check(x, weight, bias, norm, norm_dim, gate, swiglu)
    num_rows = weight.shape[0] // 2 if swiglu else weight.shape[0]
    check_shape("project", "residual", residual, (x.shape[0], num_rows))
    check_shape("project", "out", out, (x.shape[0], num_rows))
    if backend == "auto":
        head_dim = None
        if gate is not None:
            head_dim = norm_dim if norm is None else norm.numel()
        backend = _choose_backend(x, weight, bias, norm, gate, residual, head_dim)
    return get_backend("project", backend, PROJECT_BACKENDS)(
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
        inputs_ready=inputs_ready,
    )


def _choose_backend(
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
    if (
        "triton" not in PROJECT_BACKENDS
        or not len(x)
        or needs_grad(*tensors)
        or not supports_triton(*tensors)
    ):
        return "reference"
    limit = MAX_TRITON_INT8_ROWS if isinstance(weight, Int8Weight) else MAX_TRITON_ROWS
    # Tiles hold whole heads only if the head dim is a power of two.
    fits = x.shape[0] <= limit and (head_dim is None or head_dim.bit_count() == 1)
    return "triton" if fits else "products"


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
