"""Gated linear attention: one decay per key channel.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv
2312.06635. With one decay per head it is `ssd` with values divided by the step sizes.
"""

from torch import Tensor

from mmmamba_cli.ops.gla import reference
from mmmamba_cli.ops.recurrence import MatrixBackend, RecurrenceBackend, RecurrenceInputs
from mmmamba_cli.ops.recurrence_dispatch import LIBRARY_BACKENDS, run_matrix, run_scan, run_step

GLA_BACKENDS: dict[str, RecurrenceBackend] = {
    "chunked": reference.chunked,
    "recurrent": reference.recurrent,
    **LIBRARY_BACKENDS,
}
GLA_STEP_BACKENDS: dict[str, RecurrenceBackend] = {"reference": reference.step}
GLA_MATRIX_BACKENDS: dict[str, MatrixBackend] = {"reference": reference.matrix}


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
    return run_scan(GLA_BACKENDS, backend, inputs)


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
    inputs = RecurrenceInputs("gla_step", v, k, q, log_decay, scale=scale, initial_state=state)
    return run_step(GLA_STEP_BACKENDS, backend, inputs)


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
        op, no_values, k, q, log_decay, scale=scale, mask=mask, seq_idx=seq_idx
    )
    return run_matrix(GLA_MATRIX_BACKENDS, backend, inputs)
