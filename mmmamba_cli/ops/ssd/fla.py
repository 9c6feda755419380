"""The scan on flash-linear-attention's `simple_gla` (fla-org), forward only.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim. With q = C,
k = B, v = dt x and log decays g = dt A it is the same recurrence (linear attention with decay,
arXiv 2405.21060, section 7), but its state is (N, P) and all of q, k and v have H heads.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import compute_dtype, repeat_heads
from mmmamba_cli.ops.ssd.dispatch import Scan, refuse
from mmmamba_cli.ops.ssd.reference import blank_padding, real_step_sizes, without_autocast

KERNELS = "fla.ops.simple_gla"


def scan(
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
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ops.ssd`; refuses gradients and packed rows."""
    refuse("fla", Scan(x, dt, A, B, C, dt_bias, D, initial_state, seq_idx))
    kernels = library_kernels()
    share = C.shape[2] // x.shape[2]
    dtype = compute_dtype(x)
    with without_autocast(x):
        x, dt, B, C = blank_padding(mask, x, dt, B, C)
        steps = real_step_sizes(dt.to(dtype), dt_bias, dt_softplus, mask)
        values = repeat_heads(x, share)
        first = None if initial_state is None else initial_state.to(dtype).mT.contiguous()
        y, state = kernels(
            q=C,
            k=repeat_heads(B, share),
            v=(values * steps.unsqueeze(-1)).to(x.dtype),
            g=steps * A.to(dtype),
            scale=1.0,
            initial_state=first,
            output_final_state=True,
        )
        if D is not None:
            y = y.to(dtype) + D.to(dtype).unsqueeze(-1) * values
    return y.to(x.dtype), state.to(dtype).mT.contiguous()


@cache
def library_kernels() -> Callable[..., Any]:
    """`chunk_simple_gla`; MmmambaError where it cannot be imported."""
    try:
        kernels: Callable[..., Any] = importlib.import_module(KERNELS).chunk_simple_gla
    except (ImportError, AttributeError) as error:
        raise MmmambaError(
            f"ssd: the fla backend cannot be imported: {error}",
            hint="pip install fla-core, or leave the backend on auto",
        ) from error
    return kernels
