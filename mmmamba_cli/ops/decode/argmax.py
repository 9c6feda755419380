"""The likeliest token: what greedy decoding does with logits."""

from collections.abc import Callable

from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, kernel_backends, pick_backend, suits_triton
from mmmamba_cli.ops.decode import reference

LIKELIEST_BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reference": reference.likeliest,
    **kernel_backends("decode", "likeliest"),
}


def likeliest(logits: Tensor, unwanted: Tensor, *, backend: str = "auto") -> Tensor:
    """The id of each row's largest logit that may be chosen, (B,) int64.

    Args:
        logits: (B, V) without NaN; rows may lie apart, as those of a slice do.
        unwanted: (V,) bool, True for ids that are never chosen. Where all are, or all others are
            -inf, some id is.
        backend: "reference", "triton", or "auto": triton on a GPU if it is installed and the logits
            are not fp64. Of equal logits it takes the smallest id; PyTorch may take any.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    if logits.dim() != 2:
        raise ValueError(f"likeliest: logits are {tuple(logits.shape)}, expected (B, V)")
    check_shape("likeliest", "unwanted", unwanted, tuple(logits.shape[1:]))
    if backend == "auto":
        fused = "triton" in LIKELIEST_BACKENDS and logits.numel() > 0 and suits_triton(logits)
        backend = "triton" if fused else "reference"
    return pick_backend("likeliest", backend, LIKELIEST_BACKENDS)(logits, unwanted)
