"""The Mamba-2 scan: state-space duality with grouped keys and values.

Source: Dao & Gu, "Transformers are SSMs" (Mamba-2), arXiv 2405.21060; as a stand-in for attention,
with queries C, keys B and values x: mmMamba, arXiv 2502.13145.
"""

from typing import Protocol

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import (
    backend_of,
    check_shape,
    compute_dtype,
    kernel_backends,
    pick_backend,
)
from mmmamba_cli.ops.ssd import reference
from mmmamba_cli.ops.ssd.dispatch import Scan, choose


class ScanBackend(Protocol):
    """What `ssd` hands to a backend: its own arguments, checked, with T >= 1.

    `mask` and `seq_idx` mean what they mean in `ssd`; a backend must honour or refuse each.
    """

    def __call__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        *,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        D: Tensor | None,
        initial_state: Tensor | None,
        mask: Tensor | None,
        seq_idx: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]: ...


class StepBackend(Protocol):
    """What `ssd_step` hands to a backend: its own arguments, checked."""

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
    **kernel_backends("ssd", "scan"),
    **backend_of("mamba_ssm", "mamba_ssm", f"{__name__}.mamba_ssm", "scan"),
    **backend_of("fla", "fla", f"{__name__}.fla", "scan"),
}
STEP_BACKENDS: dict[str, StepBackend] = {"reference": reference.step}


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
        mask: (B, T) bool or int, 0 for padding, anywhere in a row: there the state stays as it is
            and y is exactly 0. Whatever padding holds, NaN included, changes nothing.
        seq_idx: (B, T) integer ids of packed sequences. The state is reset to 0 at each real token
            whose id differs from that of the real token before it; `initial_state` belongs to the
            first sequence of the row.
        chunk_size: tokens per chunk of the chunked backend, at most; the fused take their own.
        backend: "chunked", "recurrent"; where they are installed "triton", "mamba_ssm" and "fla",
            on a GPU; or "auto": recurrent for a single token, else the first of triton, mamba_ssm
            and fla that takes the call and computed what it should here, else chunked.

    Returns:
        y (B, T, H, P) in x's dtype, and the state after the last token, (B, H, P, N). The state
        and all arithmetic are fp32, or fp64 where x is fp64; the fused backends multiply tensors
        in bf16, with fp32 sums, where x, B and C are bf16.

    Raises:
        ValueError: shapes that do not fit together, or a chunk size below 1.
        MmmambaError: a backend that does not exist here, or does not take the call; mamba_ssm
            takes bf16 only, fla bf16 without gradients and without `seq_idx`.

    Warns, once, of a backend that `auto` passes over because it computed something else here.
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
    if backend == "auto":
        asked = Scan(x, dt, A, B, C, dt_bias, D, initial_state, seq_idx)
        backend = choose(SCAN_BACKENDS, asked)
    scan = pick_backend("ssd", backend, SCAN_BACKENDS)
    if length == 0:
        return _scan_nothing(x, C, initial_state)
    return scan(
        x,
        dt,
        A,
        B,
        C,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        D=D,
        initial_state=initial_state,
        mask=mask,
        seq_idx=seq_idx,
        chunk_size=chunk_size,
    )


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
    """One token of `ssd`, for decoding.

    Args:
        x: value (B, K, P).
        dt: step size (B, H).
        A: decay rates (H,), negative.
        B: key (B, K, N).
        C: query (B, H, N).
        state: state after the token before, (B, H, P, N); it is not changed in place.
        dt_bias, dt_softplus, D: as in `ssd`.
        backend: "reference" or "auto".

    Returns:
        y (B, H, P) in x's dtype, and the new state (B, H, P, N) in fp32, or fp64 where x is fp64.

    Raises:
        ValueError: shapes that do not fit together.
        MmmambaError: a backend that does not exist here.
    """
    batch, _, value_dim = _check_shapes("ssd_step", x, dt, A, B, C, time_dims=0)
    heads, state_dim = C.shape[-2:]
    check_shape("ssd_step", "dt_bias", dt_bias, (heads,))
    check_shape("ssd_step", "D", D, (heads,))
    check_shape("ssd_step", "state", state, (batch, heads, value_dim, state_dim))
    step = pick_backend("ssd_step", "reference" if backend == "auto" else backend, STEP_BACKENDS)
    return step(x, dt, A, B, C, state, dt_bias=dt_bias, dt_softplus=dt_softplus, D=D)


def _scan_nothing(x: Tensor, C: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """What no token at all gives: an empty y and the state as it was."""
    batch, _, heads, state_dim = C.shape
    y = x.new_zeros(batch, 0, heads, x.shape[-1])
    if initial_state is not None:
        return y, initial_state.to(compute_dtype(x))
    shape = (batch, heads, x.shape[-1], state_dim)
    return y, torch.zeros(shape, dtype=compute_dtype(x), device=x.device)


def _check_shapes(
    op: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, time_dims: int
) -> tuple[int, ...]:
    """Shape of x, after the others were held against it."""
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
