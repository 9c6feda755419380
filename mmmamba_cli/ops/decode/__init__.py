"""One decoding step of a mixer between its projections, and greedy sampling.

States and caches are updated in place. No op synchronizes and no shape depends on the position, so
that a whole decoding step can be captured as one CUDA graph. Legend: B batch, H query heads,
K key/value heads, P value dim, N state dim, Ch channels of [v, k, q], W convolution taps, S columns
of a cache, V vocabulary.
"""

from collections.abc import Callable

from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, get_backend, optional_backend, supports_triton
from mmmamba_cli.ops.decode import reference
from mmmamba_cli.ops.decode.cached_attention import ATTENTION_STEP_BACKENDS, attention_step
from mmmamba_cli.ops.decode.delta_step import (
    DELTA_MIXER_STEP_BACKENDS,
    DeltaWeights,
    delta_mixer_step,
)
from mmmamba_cli.ops.decode.mamba_step import (
    MIXER_STEP_BACKENDS,
    MixerWeights,
    mixer_step,
    to_ring_buffer,
)

__all__ = [
    "ATTENTION_STEP_BACKENDS",
    "DELTA_MIXER_STEP_BACKENDS",
    "GREEDY_ARGMAX_BACKENDS",
    "MIXER_STEP_BACKENDS",
    "DeltaWeights",
    "MixerWeights",
    "attention_step",
    "delta_mixer_step",
    "greedy_argmax",
    "mixer_step",
    "to_ring_buffer",
]

GREEDY_ARGMAX_BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reference": reference.greedy_argmax,
    **optional_backend("triton", f"{__package__}.fused", "greedy_argmax"),
}


def greedy_argmax(logits: Tensor, suppressed: Tensor, *, backend: str = "auto") -> Tensor:
    """The id of each row's largest logit that is not suppressed, (B,) int64.

    Args:
        logits: (B, V) without NaN; only the last dimension has to be contiguous.
        suppressed: (V,) bool, True for ids that are never chosen. If all are, or the others are all
            -inf, the result is an arbitrary id.
        backend: "reference", "triton", or "auto": triton on a GPU if it is installed and the logits
            are not fp64. Of equal logits triton takes the smallest id; PyTorch may take any.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    if logits.dim() != 2:
        raise ValueError(f"greedy_argmax: logits are {tuple(logits.shape)}, expected (B, V)")
    check_shape("greedy_argmax", "suppressed", suppressed, tuple(logits.shape[1:]))
    if backend == "auto":
        has_triton = "triton" in GREEDY_ARGMAX_BACKENDS
        fused = has_triton and logits.numel() > 0 and supports_triton(logits)
        backend = "triton" if fused else "reference"
    return get_backend("greedy_argmax", backend, GREEDY_ARGMAX_BACKENDS)(logits, suppressed)
