"""Softmax attention over whole sequences, padded or packed, for teachers and hybrid layers.

Legend: B batch, T queries, S keys, H query heads, K key/value heads, P head dim.
"""

from collections.abc import Callable

from torch import Tensor

from mmmamba_cli.ops.attention import reference
from mmmamba_cli.ops.attention.efficient import supports_efficient
from mmmamba_cli.ops.attention.flash import supports_flash
from mmmamba_cli.ops.attention.varlen import VarlenMetadata, varlen_metadata
from mmmamba_cli.ops.backends import check_shape, get_backend, needs_grad, optional_backend

__all__ = [
    "ATTENTION_BACKENDS",
    "VarlenMetadata",
    "attention",
    "attention_weights",
    "supports_varlen",
    "varlen_metadata",
]


# Called as `attention`, without `backend` and with all keyword arguments, after validation.
ATTENTION_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.eager_attention,
    "sdpa": reference.sdpa,
    **optional_backend("flash", f"{__package__}.flash", "flash_attention", library="torch"),
    **optional_backend(
        "efficient", f"{__package__}.efficient", "efficient_attention", library="torch"
    ),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    varlen: VarlenMetadata | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax(q k^T / sqrt(P)) v; each key/value head is shared by H / K query heads.

    Args:
        q: (B, H, T, P), any floating dtype.
        k, v: (B, K, S, P).
        is_causal: query t attends to keys 0 to t; T = S.
        mask: (B or 1, 1, T, S) bool, True where a query may attend, instead of `is_causal`.
        varlen: the sequences in the rows, each with causal attention, from `varlen_metadata`;
            instead of both, T = S. The output at padding is undefined.
        backend: "reference", "sdpa" (PyTorch selects the kernel), "flash", "efficient", or "auto":
            for `varlen` and for causal attention with gradients, the one of flash and efficient
            that supports q, else sdpa.

    "flash" is PyTorch's FlashAttention-2 in half precision, "efficient" its memory-efficient
    attention in fp32, both with deterministic gradients. On a GPU, the gradients of "sdpa" may
    differ from run to run.

    Returns:
        (B, H, T, P) in the dtype of q, or in autocast's dtype if autocast is enabled.

    Raises:
        ValueError: inconsistent shapes, or more than one of `is_causal`, `mask` and `varlen`.
        MmmambaError: a backend that is not available.
        NotImplementedError: a backend that does not support the inputs.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            f"attention: q is {tuple(q.shape)} and k {tuple(k.shape)}, expected (B, H, T, P) and "
            "(B, K, S, P), H a multiple of K"
        )
    check_shape("attention", "k", k, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]))
    check_shape("attention", "v", v, tuple(k.shape))
    if sum((is_causal, mask is not None, varlen is not None)) > 1:
        raise ValueError("attention: give one of is_causal, mask and varlen")
    if (is_causal or varlen is not None) and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: {q.shape[2]} queries and {k.shape[2]} keys, expected as many of both"
        )
    if backend == "auto":
        prefers_kernel = varlen is not None or (is_causal and needs_grad(q, k, v))
        backend = (_varlen_backend(q) if prefers_kernel else None) or "sdpa"
    attend = get_backend("attention", backend, ATTENTION_BACKENDS)
    return attend(q, k, v, is_causal=is_causal, mask=mask, varlen=varlen)


def attention_weights(
    q: Tensor, k: Tensor, *, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(P)), (B, H, T, S) fp64; arguments as in `attention`."""
    return reference.softmax_weights(q, k, is_causal=is_causal, mask=mask, varlen=None)


def supports_varlen(q: Tensor) -> bool:
    """Whether `attention` has a varlen kernel for q (..., P); otherwise it builds a slow mask."""
    return _varlen_backend(q) is not None


def _varlen_backend(q: Tensor) -> str | None:
    """The backend with a varlen kernel for q."""
    for name, supports in (("flash", supports_flash), ("efficient", supports_efficient)):
        if name in ATTENTION_BACKENDS and supports(q):
            return name
    return None
