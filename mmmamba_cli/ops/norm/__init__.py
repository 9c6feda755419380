"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), plain and gated.

Legend: H heads, P head dim, D size of the normed dimension.
"""

from collections.abc import Callable

from torch import Tensor

from mmmamba_cli.ops.common import check_shape, pick_backend
from mmmamba_cli.ops.norm import reference

GATED_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "reference": reference.gated_norm
}
PLAIN_BACKENDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"reference": reference.norm}


def gated_rms_norm(
    y: Tensor, gate: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """RMSNorm_P(y) * weight * SiLU(gate), the output gate of mmMamba's mixer (arXiv 2502.13145).

    Args:
        y: read-out of the scan (..., H, P); every head is normed by itself.
        gate: (..., H, P), before SiLU.
        weight: (P,), shared by the heads.
        eps: added to the mean square.
        backend: "reference" or "auto".

    Returns:
        (..., H, P) in y's dtype; norm, weight and gate are computed in fp32, or fp64 where y is
        fp64.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    check_shape("gated_rms_norm", "gate", gate, tuple(y.shape))
    check_shape("gated_rms_norm", "weight", weight, (y.shape[-1],))
    name = "reference" if backend == "auto" else backend
    return pick_backend("gated_rms_norm", name, GATED_BACKENDS)(y, gate, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """RMSNorm_D(x) * weight over the last dimension, as Llama and InternLM2 compute it.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
        backend: "reference" or "auto".

    Returns:
        (..., D) in x's dtype. The norm is computed in fp32, or fp64 where x is fp64, rounded to
        x's dtype, and only then multiplied by the weight.

    Raises:
        ValueError: a weight that does not fit x.
        MmmambaError: a backend that does not exist here.
    """
    check_shape("rms_norm", "weight", weight, (x.shape[-1],))
    name = "reference" if backend == "auto" else backend
    return pick_backend("rms_norm", name, PLAIN_BACKENDS)(x, weight, eps)
