"""The Mamba-2 scan: state-space duality with grouped keys and values.

Sources: Dao & Gu, "Transformers are SSMs" (Mamba-2), arXiv 2405.21060; as a replacement of
attention, with queries C, keys B and values x: mmMamba, arXiv 2502.13145.
"""

from typing import Protocol

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import check_shape, compute_dtype, get_backend, optional_backend
from mmmamba_cli.ops.ssd import reference
from mmmamba_cli.ops.ssd.dispatch import select_backend
from mmmamba_cli.ops.ssd.reference import ScanBackend, ScanInputs


class StepBackend(Protocol):
    """A backend of `ssd_step`, called with its arguments after validation."""

    def __call__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        *,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        D: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...


SCAN_BACKENDS: dict[str, ScanBackend] = {
    "chunked": reference.chunked,
    "recurrent": reference.recurrent,
    **optional_backend("triton", f"{__package__}.fused", "scan"),
    **optional_backend("mamba_ssm", f"{__package__}.mamba_ssm", "scan", "mamba_ssm"),
    **optional_backend("fla", f"{__package__}.fla", "scan", "fla"),
}
SCAN_STEP_BACKENDS: dict[str, StepBackend] = {"reference": reference.step}


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 128,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the selective state-space recurrence over T tokens (arXiv 2405.21060, equation 1).

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        S_0 = initial_state, or 0
        y_t = S_t C_t + D x_t

    for each of H query heads; head h takes x and B of key/value head h // G. Legend: B batch,
    T tokens, H query heads, K key/value heads, G = H / K, P value dim, N state dim.

    Args:
        x: values (B, T, K, P), any floating dtype.
        dt: step sizes (B, T, H), before `dt_bias` and softplus if these are given.
        A: decay rates (H,), negative.
        B: keys (B, T, K, N).
        C: queries (B, T, H, N).
        dt_bias: (H,), added to dt.
        dt_softplus: whether the step size is softplus(dt + dt_bias), computed in fp32.
        D: skip connection (H,).
        initial_state: (B, H, P, N).
        mask: (B, T) bool or int, 0 at padding, which may be anywhere in a row. Padding leaves the
            state unchanged and its y is exactly 0; its inputs are ignored, NaN included.
        seq_idx: (B, T) integer ids of packed sequences. The state is reset to 0 at each real token
            whose id differs from that of the previous real token; `initial_state` belongs to the
            first sequence of the row.
        chunk_size: maximum tokens per chunk of the chunked backend; the fused backends use fixed
            chunk sizes.
        backend: "chunked" or "recurrent"; on a GPU also "triton", "mamba_ssm" and "fla" if they
            are installed; or "auto": recurrent for a single token, else the first of triton,
            mamba_ssm and fla that supports the inputs and passed its self-test, else chunked.

    Returns:
        y (B, T, H, P) in x's dtype, and the state after the last token, (B, H, P, N). The state
        and all arithmetic are fp32, or fp64 if x is fp64; the fused backends multiply in bf16
        with fp32 accumulation if x, B and C are bf16.

    Raises:
        ValueError: inconsistent shapes, or a chunk size below 1.
        MmmambaError: a backend that is not available or does not support the inputs; mamba_ssm
            supports bf16 only, fla bf16 without gradients and without `seq_idx`.

    Warns:
        RuntimeWarning: "auto" skips a backend that failed its self-test; once per process.
    """
    batch, length, _, value_dim = _check_shapes("ssd", x, dt, A, B, C, time_dims=1)
    heads, state_dim = C.shape[-2:]
    check_shape("ssd", "dt_bias", dt_bias, (heads,))
    check_shape("ssd", "D", D, (heads,))
    check_shape("ssd", "initial_state", initial_state, (batch, heads, value_dim, state_dim))
    check_shape("ssd", "mask", mask, (batch, length))
    check_shape("ssd", "seq_idx", seq_idx, (batch, length))
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}, expected at least 1")
    inputs = ScanInputs(
        x, dt, A, B, C, dt_bias, dt_softplus, D, initial_state, mask, seq_idx, chunk_size
    )
    if backend == "auto":
        backend = select_backend(SCAN_BACKENDS, inputs)
    scan = get_backend("ssd", backend, SCAN_BACKENDS)
    return scan(inputs) if length else _empty_scan(inputs)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    D: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run one token of `ssd`, for decoding.

    Args:
        x: value (B, K, P).
        dt: step size (B, H).
        A: decay rates (H,), negative.
        B: key (B, K, N).
        C: query (B, H, N).
        state: state after the previous token, (B, H, P, N); not modified.
        dt_bias, dt_softplus, D: as in `ssd`.
        backend: "reference" or "auto".

    Returns:
        y (B, H, P) in x's dtype, and the new state (B, H, P, N) in fp32, or fp64 if x is fp64.

    Raises:
        ValueError: inconsistent shapes.
        MmmambaError: a backend that is not available.
    """
    batch, _, value_dim = _check_shapes("ssd_step", x, dt, A, B, C, time_dims=0)
    heads, state_dim = C.shape[-2:]
    check_shape("ssd_step", "dt_bias", dt_bias, (heads,))
    check_shape("ssd_step", "D", D, (heads,))
    check_shape("ssd_step", "state", state, (batch, heads, value_dim, state_dim))
    name = "reference" if backend == "auto" else backend
    step = get_backend("ssd_step", name, SCAN_STEP_BACKENDS)
    return step(x, dt, A, B, C, state, dt_bias=dt_bias, dt_softplus=dt_softplus, D=D)


def _empty_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The result for T = 0: an empty y and the initial state."""
    x, C, state = inputs.x, inputs.C, inputs.initial_state
    batch, _, heads, state_dim = C.shape
    y = x.new_zeros(batch, 0, heads, x.shape[-1])
    if state is not None:
        return y, state.to(compute_dtype(x))
    shape = (batch, heads, x.shape[-1], state_dim)
    return y, torch.zeros(shape, dtype=compute_dtype(x), device=x.device)


def _check_shapes(
    op: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, time_dims: int
) -> tuple[int, ...]:
    """Check all shapes against those of x and C; returns the shape of x.

    `time_dims` is 1 for tensors with a T dimension, 0 for those of a single step.
    """
    if x.dim() != 3 + time_dims or C.dim() != 3 + time_dims:
        raise ValueError(
            f"{op}: x is {tuple(x.shape)} and C {tuple(C.shape)}, "
            f"expected {3 + time_dims} dimensions each"
        )
    leading, kv_heads, heads = tuple(x.shape[:-2]), x.shape[-2], C.shape[-2]
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: {heads} query heads in C are no multiple of {kv_heads} key/value heads in x"
        )
    check_shape(op, "C", C, (*leading, heads, C.shape[-1]))
    check_shape(op, "B", B, (*leading, kv_heads, C.shape[-1]))
    check_shape(op, "dt", dt, (*leading, heads))
    check_shape(op, "A", A, (heads,))
    return tuple(x.shape)
