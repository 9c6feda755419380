"""The gated delta rule: linear attention that replaces what the state holds for a key.

Sources: Yang, Kautz & Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464 (one decay per head);
Kimi Team, "Kimi Linear", arXiv 2510.26692 (Kimi delta attention: one decay per key channel).
"""

from torch import Tensor

from mmmamba_cli.ops.delta import reference
from mmmamba_cli.ops.recurrence import MatrixBackend, RecurrenceBackend, RecurrenceInputs
from mmmamba_cli.ops.recurrence_dispatch import LIBRARY_BACKENDS, run_matrix, run_scan, run_step

DELTA_BACKENDS: dict[str, RecurrenceBackend] = {
    "chunked": reference.chunked,
    "recurrent": reference.recurrent,
    **LIBRARY_BACKENDS,
}
DELTA_STEP_BACKENDS: dict[str, RecurrenceBackend] = {"reference": reference.step}
DELTA_MATRIX_BACKENDS: dict[str, MatrixBackend] = {"reference": reference.matrix}


def delta_rule(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_l2_norm: bool = False,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule over T tokens (arXiv 2412.06464, equation 10).

        S~_t = S_{t-1} diag(exp(log_decay_t))        S_0 = initial_state, or 0
        S_t  = S~_t + beta_t (v_t - S~_t k_t) k_t^T
        y_t  = scale S_t q_t

    for each of H query heads; head h takes v and k of key/value head h // G. With one decay per key
    channel it is Kimi delta attention (arXiv 2510.26692). Legend: B batch, T tokens, H query heads,
    K key/value heads, G = H / K, P value dim, N key dim.

    Args:
        v: values (B, T, K, P), any floating dtype.
        k: keys (B, T, K, N). The state stays bounded for beta in [0, 1] and keys of norm 1.
        q: queries (B, T, H, N).
        log_decay: logarithms of the decays, at most 0, (B, T, H) or, per key channel, (B, T, H, N).
        beta: write strengths (B, T, H).
        scale: factor of the queries; None is N^-0.5.
        qk_l2_norm: whether q and k are divided by sqrt(sum of squares + 1e-6) per head before.
        initial_state: (B, H, P, N).
        mask: (B, T) bool or int, 0 at padding, which may be anywhere in a row. Padding leaves the
            state unchanged and its y is exactly 0; its inputs are ignored, NaN included.
        seq_idx: (B, T) integer ids of packed sequences. The state is reset to 0 at each real token
            whose id differs from that of the previous real token; `initial_state` belongs to the
            first sequence of the row.
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
    op = "delta_rule"
    inputs = RecurrenceInputs(
        op, v, k, q, log_decay, beta, scale, qk_l2_norm, initial_state, mask, seq_idx, chunk_size
    )
    return run_scan(DELTA_BACKENDS, backend, inputs)


def delta_rule_step(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    qk_l2_norm: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run one token of `delta_rule`, for decoding; a CUDA graph can capture it.

    Args:
        v: value (B, K, P).
        k: key (B, K, N).
        q: query (B, H, N).
        log_decay: (B, H) or (B, H, N).
        beta: (B, H).
        state: state after the previous token, (B, H, P, N); not modified.
        scale, qk_l2_norm: as in `delta_rule`.
        backend: "reference" or "auto".

    Returns:
        y (B, H, P) in v's dtype, and the new state (B, H, P, N) in fp32, or fp64 if v is fp64.

    Raises:
        ValueError: inconsistent shapes.
        MmmambaError: a backend that is not available.
    """
    inputs = RecurrenceInputs(
        "delta_rule_step", v, k, q, log_decay, beta, scale, qk_l2_norm, initial_state=state
    )
    return run_step(DELTA_STEP_BACKENDS, backend, inputs)


def delta_rule_matrix(
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_l2_norm: bool = False,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The matrices M (B, H, T, T) with y = M v for a zero initial state, lower triangular.

    With all tokens as one chunk, M = A (I + L)^-1 diag(beta) (see `reference.chunked`). Rows and
    columns of padding are 0. Differentiable; arguments as in `delta_rule`, except that `backend`
    is "reference" or "auto".

    Returns:
        M in fp32, or fp64 if k is fp64.

    Raises:
        ValueError: inconsistent shapes.
        MmmambaError: a backend that is not available.
    """
    op, no_values = "delta_rule_matrix", k[..., :0]
    inputs = RecurrenceInputs(
        op, no_values, k, q, log_decay, beta, scale, qk_l2_norm, mask=mask, seq_idx=seq_idx
    )
    return run_matrix(DELTA_MATRIX_BACKENDS, backend, inputs)
