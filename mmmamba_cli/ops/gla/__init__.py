"""Gated linear attention: one decay per key channel.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv
2312.06635. With one decay per head it is `ssd` with values divided by the step sizes.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, compute_dtype, get_backend
from mmmamba_cli.ops.gla import reference
from mmmamba_cli.ops.recurrence import (
    RecurrenceBackend,
    RecurrenceInputs,
    check_inputs,
    check_tokens,
    empty_result,
)
from mmmamba_cli.ops.recurrence_dispatch import LIBRARY_BACKENDS, select_backend


class GlaStepBackend(Protocol):
    """A backend of `gla_step`, called with its arguments after validation."""

    def __call__(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        log_decay: Tensor,
        state: Tensor,
        *,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]: ...


GLA_BACKENDS: dict[str, RecurrenceBackend] = {
    "chunked": reference.chunked,
    "recurrent": reference.recurrent,
    **LIBRARY_BACKENDS,
}
GLA_STEP_BACKENDS: dict[str, GlaStepBackend] = {"reference": reference.step}
GLA_MATRIX_BACKENDS: dict[str, Callable[[RecurrenceInputs], Tensor]] = {
    "reference": reference.matrix
}


def gla(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run gated linear attention over T tokens (arXiv 2312.06635, section 4.1).

        S_t = S_{t-1} diag(exp(log_decay_t)) + v_t k_t^T        S_0 = initial_state, or 0
        y_t = scale S_t q_t

    for each of H query heads; head h takes v and k of key/value head h // G. Legend: B batch,
    T tokens, H query heads, K key/value heads, G = H / K, P value dim, N key dim.

    Args:
        v: values (B, T, K, P), any floating dtype.
        k: keys (B, T, K, N).
        q: queries (B, T, H, N).
        log_decay: logarithms of the decays, at most 0, (B, T, H, N).
        scale: factor of the queries; None is N^-0.5.
        initial_state: (B, H, P, N).
        mask, seq_idx: padding and packed sequences, as in `delta_rule`.
        chunk_size: maximum tokens per chunk of the chunked backend.
        backend: "chunked" or "recurrent"; on a GPU also "fla" if it is installed; or "auto":
            recurrent for a single token, else fla if it supports the inputs and passed its
            self-test, else chunked.

    Returns:
        y (B, T, H, P) in v's dtype, and the state after the last token, (B, H, P, N). The state
        and all arithmetic are fp32, or fp64 if v is fp64; fla multiplies in bf16.

    Raises:
        ValueError: inconsistent shapes, or a chunk size below 1.
        MmmambaError: a backend that is not available or does not support the inputs; fla supports
            bf16 without gradients and without `seq_idx`.

    Warns:
        RuntimeWarning: "auto" skips a backend that failed its self-test; once per process.
    """
    inputs = RecurrenceInputs(
        "gla", v, k, q, log_decay, None, scale, False, initial_state, mask, seq_idx, chunk_size
    )
    check_inputs(inputs, per_head_decay=False)
    if backend == "auto":
        backend = select_backend(GLA_BACKENDS, inputs)
    scan = get_backend("gla", backend, GLA_BACKENDS)
    return scan(inputs) if v.shape[1] else empty_result(inputs)


def gla_step(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run one token of `gla`, for decoding; a CUDA graph can capture it.

    Args:
        v: value (B, K, P).
        k: key (B, K, N).
        q: query (B, H, N).
        log_decay: (B, H, N).
        state: state after the previous token, (B, H, P, N); not modified.
        scale: as in `gla`.
        backend: "reference" or "auto".

    Returns:
        y (B, H, P) in v's dtype, and the new state (B, H, P, N) in fp32, or fp64 if v is fp64.

    Raises:
        ValueError: inconsistent shapes.
        MmmambaError: a backend that is not available.
    """
    check_tokens("gla_step", v, k, q, log_decay, None, 0, False)
    batch, heads, key_dim = q.shape
    check_shape("gla_step", "state", state, (batch, heads, v.shape[-1], key_dim))
    name = "reference" if backend == "auto" else backend
    step = get_backend("gla_step", name, GLA_STEP_BACKENDS)
    return step(v, k, q, log_decay, state, scale=scale)


def gla_matrix(
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The matrices M (B, H, T, T) with y = M v for a zero initial state, lower triangular.

    Rows and columns of padding are 0. Differentiable; arguments as in `gla`, except that `backend`
    is "reference" or "auto".

    Returns:
        M in fp32, or fp64 if k is fp64.

    Raises:
        ValueError: inconsistent shapes.
        MmmambaError: a backend that is not available.
    """
    op, no_values = "gla_matrix", k[..., :0]
    inputs = RecurrenceInputs(
        op, no_values, k, q, log_decay, None, scale, False, None, mask, seq_idx, 1
    )
    check_inputs(inputs, per_head_decay=False)
    name = "reference" if backend == "auto" else backend
    matrix = get_backend(op, name, GLA_MATRIX_BACKENDS)
    if not q.shape[1]:
        return torch.zeros(len(q), q.shape[2], 0, 0, dtype=compute_dtype(k), device=q.device)
    return matrix(inputs)
