"""Softmax attention over a sliding window, with the first tokens of a sequence or learned logits
as attention sinks.

Every real token has an ordinal 0, 1, 2, ... in its sequence. A query of ordinal i attends to the
keys of its sequence with ordinals j <= i for which i - j < W or j < F. Sources: first tokens as
sinks: StreamingLLM (Xiao et al.), arXiv 2309.17453; a learned logit in the denominator: gpt-oss
(OpenAI), arXiv 2508.10925. Legend: B batch, T columns, H query heads, K key/value heads, P head
dim, W window, F first tokens (`sinks`).
"""

from typing import Protocol

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, compute_dtype, get_backend
from mmmamba_cli.ops.window import reference
from mmmamba_cli.ops.window.blocked import blocked
from mmmamba_cli.ops.window.inputs import WindowBackend, WindowInputs
from mmmamba_cli.ops.window.state import WindowState, empty_state, next_state

__all__ = [
    "WINDOW_ATTENTION_BACKENDS",
    "WINDOW_MATRIX_BACKENDS",
    "WINDOW_STEP_BACKENDS",
    "WindowState",
    "window_attention",
    "window_matrix",
    "window_state",
    "window_step",
]


class WindowStepBackend(Protocol):
    """A backend of `window_step`, called with its arguments after validation."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: WindowState,
        sinks: int,
        sink_logits: Tensor | None,
    ) -> Tensor: ...


WINDOW_ATTENTION_BACKENDS: dict[str, WindowBackend] = {
    "blocked": blocked,
    "reference": reference.dense,
}
WINDOW_MATRIX_BACKENDS: dict[str, WindowBackend] = {"reference": reference.matrix}
WINDOW_STEP_BACKENDS: dict[str, WindowStepBackend] = {"reference": reference.step}
# Smaller blocks are slower: with a small window a block is a few small products.
MIN_BLOCK_COLUMNS = 128


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    sink_logits: Tensor | None = None,
    past_keys: Tensor | None = None,
    past_values: Tensor | None = None,
    past_counts: Tensor | None = None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    block_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax(q k^T / sqrt(P)) v over the window and the sinks of each query.

    Args:
        q: (B, H, T, P), any floating dtype; RoPE is already applied to q and k.
        k, v: (B, K, T, P); each head is shared by H / K query heads.
        window: W, at least 1; the query itself is one of the W tokens.
        sinks: F, the first tokens of its sequence that every query attends to.
        sink_logits: (H,), a logit of each head in the softmax's denominator, without key and value;
            -inf is none.
        past_keys, past_values, past_counts: the state before this call, from `window_state`: (B, K,
            F + W, P) and (B,); all three or none. It belongs to the first sequence of each row.
        mask: (B, T) bool or int, 0 at padding, which may be anywhere in a row. Padding has no
            ordinal; its y is exactly 0, and its inputs are ignored, NaN included.
        seq_idx: (B, T) integer ids of packed sequences. A sequence starts at each real token whose
            id differs from that of the previous real token.
        block_size: queries per block of the blocked backend; default W, at least 128.
        backend: "blocked" (time and memory linear in T), "reference" (all T x T scores in fp32 or
            fp64), or "auto": blocked.

    Returns:
        y (B, H, T, P) in the dtype of q; of "blocked", in autocast's dtype if autocast is enabled.
        Blocked attention is PyTorch's fused function, whose gradients may differ from run to run on
        a GPU and which rounds `sink_logits` to the dtype of q.

    Raises:
        ValueError: inconsistent shapes, or a window or a block size below 1, or negative sinks.
        MmmambaError: a backend that is not available.
    """
    op = "window_attention"
    _check_heads(op, q, k, v, time_dims=1)
    _check_sizes(op, window, sinks)
    past = _past(op, k, window, sinks, past_keys, past_values, past_counts)
    batch, heads, length, _ = q.shape
    check_shape(op, "sink_logits", sink_logits, (heads,))
    check_shape(op, "mask", mask, (batch, length))
    check_shape(op, "seq_idx", seq_idx, (batch, length))
    if block_size is None:
        block_size = max(MIN_BLOCK_COLUMNS, window)
    if block_size < 1:
        raise ValueError(f"{op}: block_size is {block_size}, expected at least 1")
    name = "blocked" if backend == "auto" else backend
    attend = get_backend(op, name, WINDOW_ATTENTION_BACKENDS)
    if q.numel() == 0:
        return torch.zeros_like(q)
    return attend(
        WindowInputs(q, k, v, window, sinks, sink_logits, past, mask, seq_idx, block_size)
    )


def window_state(
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    past_keys: Tensor | None = None,
    past_values: Tensor | None = None,
    past_counts: Tensor | None = None,
    mask: Tensor | None = None,
) -> WindowState:
    """The state after the T columns of k and v, for the next call or for `window_step`.

    While a row has at most W tokens, they are in slots F, F + 1, ... in order. The state does not
    synchronize with the device.

    Args:
        k, v: (B, K, T, P); RoPE is already applied to k.
        window, sinks, past_keys, past_values, past_counts, mask: as in `window_attention`.

    Returns:
        keys and values (B, K, F + W, P) in the dtype of the past, or of k and v without one, and
        counts (B,) int64. Slot j < F has the token of ordinal j, slot F + r the newest token whose
        ordinal o satisfies o mod W = r. Empty slots are 0, or as in the past.

    Raises:
        ValueError: inconsistent shapes, a window below 1, or negative sinks.
    """
    op = "window_state"
    if k.dim() != 4:
        raise ValueError(f"{op}: k is {tuple(k.shape)}, expected (B, K, T, P)")
    check_shape(op, "v", v, tuple(k.shape))
    _check_sizes(op, window, sinks)
    check_shape(op, "mask", mask, (k.shape[0], k.shape[2]))
    past = _past(op, k, window, sinks, past_keys, past_values, past_counts)
    return next_state(k, v, past or empty_state(k, v, window, sinks), mask, sinks)


def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    *,
    sinks: int = 0,
    sink_logits: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one token, for decoding: store its key and value, attend.

    It neither synchronizes nor has shapes that depend on values, so that it can be captured as a
    CUDA graph.

    Args:
        q: (B, H, P); RoPE is already applied to q and k.
        k, v: (B, K, P).
        keys, values: the state from `window_state`, (B, K, F + W, P); updated in place.
        counts: (B,) integers, the tokens in the state; not modified, the caller adds 1 for the next
            token.
        sinks, sink_logits: as in `window_attention`.
        backend: "reference" or "auto".

    Returns:
        y (B, H * P) in the dtype of q.

    Raises:
        ValueError: inconsistent shapes, or negative sinks.
        MmmambaError: a backend that is not available.
    """
    op = "window_step"
    _check_heads(op, q, k, v, time_dims=0)
    (batch, kv_heads, dim), slots = k.shape, keys.shape[2] if keys.dim() == 4 else 0
    _check_sizes(op, 1, sinks)
    if slots <= sinks:
        raise ValueError(
            f"{op}: keys are {tuple(keys.shape)}, expected (B, K, F + W, P) with F = {sinks} and W "
            "at least 1"
        )
    check_shape(op, "keys", keys, (batch, kv_heads, slots, dim))
    check_shape(op, "values", values, (batch, kv_heads, slots, dim))
    check_shape(op, "counts", counts, (batch,))
    check_shape(op, "sink_logits", sink_logits, (q.shape[1],))
    name = "reference" if backend == "auto" else backend
    step = get_backend(op, name, WINDOW_STEP_BACKENDS)
    return step(q, k, v, WindowState(keys, values, counts), sinks, sink_logits)


def window_matrix(
    q: Tensor,
    k: Tensor,
    *,
    window: int,
    sinks: int = 0,
    sink_logits: Tensor | None = None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The softmax of `window_attention` without a past.

    Args:
        q, k, window, sinks, sink_logits, mask, seq_idx: as in `window_attention`.
        backend: "reference" or "auto".

    Returns:
        (B, H, T, T) in fp32, or in fp64 if q is fp64; 0 where a query does not attend and in rows
        of padding. With `sink_logits` the other rows sum to less than 1.

    Raises:
        ValueError: inconsistent shapes, a window below 1, or negative sinks.
        MmmambaError: a backend that is not available.
    """
    op = "window_matrix"
    _check_heads(op, q, k, k, time_dims=1)
    _check_sizes(op, window, sinks)
    batch, heads, length, _ = q.shape
    check_shape(op, "sink_logits", sink_logits, (heads,))
    check_shape(op, "mask", mask, (batch, length))
    check_shape(op, "seq_idx", seq_idx, (batch, length))
    name = "reference" if backend == "auto" else backend
    matrix = get_backend(op, name, WINDOW_MATRIX_BACKENDS)
    if length == 0:
        return q.new_zeros(batch, heads, 0, 0, dtype=compute_dtype(q))
    return matrix(WindowInputs(q, k, k, window, sinks, sink_logits, None, mask, seq_idx, length))


def _past(
    op: str,
    k: Tensor,
    window: int,
    sinks: int,
    keys: Tensor | None,
    values: Tensor | None,
    counts: Tensor | None,
) -> WindowState | None:
    """The state before the call, after validation; None if there is none."""
    if keys is None and values is None and counts is None:
        return None
    if keys is None or values is None or counts is None:
        raise ValueError(f"{op}: give all of past_keys, past_values and past_counts, or none")
    batch, kv_heads, _, dim = k.shape
    for name, tensor in (("past_keys", keys), ("past_values", values)):
        check_shape(op, name, tensor, (batch, kv_heads, sinks + window, dim))
    check_shape(op, "past_counts", counts, (batch,))
    return WindowState(keys, values, counts)


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, *, time_dims: int) -> None:
    dims = 3 + time_dims
    if q.dim() != dims or k.dim() != dims or q.shape[1] % max(1, k.shape[1]):
        names = ("(B, H, P) and (B, K, P)", "(B, H, T, P) and (B, K, T, P)")[time_dims]
        raise ValueError(
            f"{op}: q is {tuple(q.shape)} and k {tuple(k.shape)}, expected {names}, H a multiple "
            "of K"
        )
    check_shape(op, "k", k, (q.shape[0], k.shape[1], *q.shape[2:]))
    check_shape(op, "v", v, tuple(k.shape))


def _check_sizes(op: str, window: int, sinks: int) -> None:
    if window < 1:
        raise ValueError(f"{op}: window is {window}, expected at least 1")
    if sinks < 0:
        raise ValueError(f"{op}: sinks is {sinks}, expected at least 0")
