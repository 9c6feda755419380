"""Softmax attention over whole sequences, padded or packed: of teachers, and of layers that remain.

Legend: B batch, T queries, S keys, H query heads, K key/value heads, P head dim.
"""

from typing import Protocol

from torch import Tensor

from mmmamba_cli.ops.attention import reference
from mmmamba_cli.ops.attention.flash import suits_flash
from mmmamba_cli.ops.attention.varlen import Segments, segments_of
from mmmamba_cli.ops.backends import check_shape, kernel_backends, pick_backend, wants_gradients

__all__ = [
    "ATTENTION_BACKENDS",
    "Segments",
    "attention",
    "attention_weights",
    "segments_of",
    "takes_segments",
]


class AttentionBackend(Protocol):
    """What `attention` hands to a backend: its own arguments, checked."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool,
        mask: Tensor | None,
        segments: Segments | None,
    ) -> Tensor: ...


ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "reference": reference.written_out,
    "sdpa": reference.scaled_dot_product,
    **kernel_backends("attention", "attend", name="flash", module="flash", library="torch"),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v, each key/value head serving H / K query heads.

    Args:
        q: (B, H, T, P), any floating dtype.
        k, v: (B, K, S, P).
        is_causal: query t sees keys 0 to t; T = S.
        mask: (B or 1, 1, T, S) bool, True where a query may look, in place of `is_causal`.
        segments: in place of both, the sequences that the rows hold, each causal in itself
            (`segments_of`); T = S. What comes out at padding means nothing.
        backend: "reference", "sdpa" (PyTorch's choice among its kernels), "flash", or "auto":
            flash where it can be had for segments, and for whatever is causal and differentiated.

    flash is FlashAttention-2 as PyTorch has it. Its gradients are sums in a fixed order here, and
    so the same bits each time; those that "sdpa" chooses need not be, on a GPU.

    Returns:
        (B, H, T, P), in the dtype of q, or the one of autocast where that is on.

    Raises:
        ValueError: shapes that do not fit together; more than one of the three that say who sees.
        MmmambaError: a backend that does not exist here.
        NotImplementedError: a backend that cannot do this.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            f"attention: q is {tuple(q.shape)} and k {tuple(k.shape)}, expected (B, H, T, P) and "
            "(B, K, S, P), H a multiple of K"
        )
    check_shape("attention", "k", k, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]))
    check_shape("attention", "v", v, tuple(k.shape))
    ways = [is_causal, mask is not None, segments is not None]
    if sum(ways) > 1:
        raise ValueError("attention: give one of is_causal, mask and segments")
    if (is_causal or segments is not None) and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: {q.shape[2]} queries and {k.shape[2]} keys, expected as many of both"
        )
    if backend == "auto":
        wanted = segments is not None or (is_causal and wants_gradients(q, k, v))
        backend = "flash" if wanted and takes_segments(q) else "sdpa"
    attend = pick_backend("attention", backend, ATTENTION_BACKENDS)
    return attend(q, k, v, is_causal=is_causal, mask=mask, segments=segments)


def attention_weights(
    q: Tensor, k: Tensor, *, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(P)), (B, H, T, S) fp64; arguments as in `attention`."""
    return reference.softmax_weights(q, k, is_causal=is_causal, mask=mask, segments=None)


def takes_segments(q: Tensor) -> bool:
    """Whether `attention` takes queries (..., P) by sequences, where a mask would be slow."""
    return "flash" in ATTENTION_BACKENDS and suits_flash(q)
