"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), plain and gated.

Legend: H heads, P head dim, D size of the normalized dimension.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, get_backend, optional_backend, supports_triton
from mmmamba_cli.ops.norm import reference

GATED_RMS_NORM_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "reference": reference.gated_norm,
    **optional_backend("triton", f"{__package__}.fused", "gated_norm"),
}
RMS_NORM_BACKENDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "reference": reference.norm,
    **optional_backend("triton", f"{__package__}.fused", "norm"),
}
# Maximum size of the normalized dimension, because a program holds whole rows in registers.
MAX_TRITON_DIM = 16384


def gated_rms_norm(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """Compute RMSNorm_P(y) * weight * SiLU(gate), the output gate of mmMamba (arXiv 2502.13145).

    Args:
        y: output of the scan (..., H, P); every head is normalized separately.
        gate: (..., H, P), before SiLU.
        weight: (P,), shared by the heads.
        eps: added to the mean square.
        backend: "reference", "triton", or "auto": triton on a GPU if it is installed and no tensor
            is fp64.

    Returns:
        (..., H, P) in y's dtype; computed in fp32, or fp64 if y is fp64.

    Raises:
        ValueError: inconsistent shapes.
        MmmambaError: a backend that is not available.
    """
    check_shape("gated_rms_norm", "gate", gate, tuple(y.shape))
    check_shape("gated_rms_norm", "weight", weight, (y.shape[-1],))
    if backend == "auto":
        backend = _auto_backend(GATED_RMS_NORM_BACKENDS, y, gate, weight)
    return get_backend("gated_rms_norm", backend, GATED_RMS_NORM_BACKENDS)(y, gate, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Compute RMSNorm_D(x) * weight over the last dimension, as in Llama and InternLM2.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
        backend: "reference", "triton", or "auto": triton on a GPU if it is installed and no tensor
            is fp64.

    Returns:
        (..., D) in x's dtype. The norm is computed in fp32, or fp64 if x is fp64, and rounded to
        x's dtype before the multiplication by the weight.

    Raises:
        ValueError: a weight whose shape does not match x.
        MmmambaError: a backend that is not available.
    """
    check_shape("rms_norm", "weight", weight, (x.shape[-1],))
    if backend == "auto":
        backend = _auto_backend(RMS_NORM_BACKENDS, x, weight)
    return get_backend("rms_norm", backend, RMS_NORM_BACKENDS)(x, weight, eps)


def _auto_backend(backends: Mapping[str, object], x: Tensor, *others: Tensor) -> str:
    fits = x.numel() > 0 and x.shape[-1] <= MAX_TRITON_DIM
    fused = "triton" in backends and fits and supports_triton(x, *others)
    return "triton" if fused else "reference"
