"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), plain and gated.

Legend: H heads, P head dim, D size of the normed dimension.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, kernel_backends, pick_backend, suits_triton
from mmmamba_cli.ops.norm import reference

GATED_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "reference": reference.gated_norm,
    **kernel_backends("norm", "gated_norm"),
}
PLAIN_BACKENDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "reference": reference.norm,
    **kernel_backends("norm", "norm"),
}
# A program holds whole rows.
MOST_TRITON_DIMS = 16384


def gated_rms_norm(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """RMSNorm_P(y) * weight * SiLU(gate), the output gate of mmMamba's mixer (arXiv 2502.13145).

    Args:
        y: read-out of the scan (..., H, P); every head is normed by itself.
        gate: (..., H, P), before SiLU.
        weight: (P,), shared by the heads.
        eps: added to the mean square.
        backend: "reference", "triton", or "auto": triton on a GPU if it is installed and nothing is
            fp64.

    Returns:
        (..., H, P) in y's dtype; norm, weight and gate are computed in fp32, or fp64 where y is
        fp64.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    check_shape("gated_rms_norm", "gate", gate, tuple(y.shape))
    check_shape("gated_rms_norm", "weight", weight, (y.shape[-1],))
    if backend == "auto":
        backend = _chosen(GATED_BACKENDS, y, gate, weight)
    return pick_backend("gated_rms_norm", backend, GATED_BACKENDS)(y, gate, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """RMSNorm_D(x) * weight over the last dimension, as Llama and InternLM2 compute it.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
        backend: "reference", "triton", or "auto": triton on a GPU if it is installed and nothing is
            fp64.

    Returns:
        (..., D) in x's dtype. The norm is computed in fp32, or fp64 where x is fp64, rounded to
        x's dtype, and only then multiplied by the weight.

    Raises:
        ValueError: a weight that does not fit x.
        MmmambaError: a backend that does not exist here.
    """
    check_shape("rms_norm", "weight", weight, (x.shape[-1],))
    if backend == "auto":
        backend = _chosen(PLAIN_BACKENDS, x, weight)
    return pick_backend("rms_norm", backend, PLAIN_BACKENDS)(x, weight, eps)


def _chosen(backends: Mapping[str, object], x: Tensor, *others: Tensor) -> str:
    fits = x.numel() > 0 and x.shape[-1] <= MOST_TRITON_DIMS
    return "triton" if "triton" in backends and fits and suits_triton(x, *others) else "reference"
