"""The scan on flash-linear-attention's `simple_gla` (fla-org), forward only.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim. With q = C,
k = B, v = dt x and log decays g = dt A it is the same recurrence (linear attention with decay,
arXiv 2405.21060, section 7). In fla the state is (N, P) and q, k and v all have H heads.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import compute_dtype, repeat_heads, without_autocast
from mmmamba_cli.ops.ssd.dispatch import check_supported
from mmmamba_cli.ops.ssd.reference import ScanInputs, masked_tokens

KERNELS = "fla.ops.simple_gla"


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run `ops.ssd`; raises MmmambaError for gradients, `seq_idx` and what `LIMITS` excludes."""
    check_supported("fla", inputs)
    kernels = library_kernels()
    dtype, state = compute_dtype(inputs.x), inputs.initial_state
    with without_autocast(inputs.x):
        x, step_sizes, B, C = masked_tokens(inputs)
        values = repeat_heads(x, inputs.group_size)
        y, state = kernels(
            q=C,
            k=repeat_heads(B, inputs.group_size),
            v=(values * step_sizes.unsqueeze(-1)).to(x.dtype),
            g=step_sizes * inputs.A.to(dtype),
            scale=1.0,
            initial_state=None if state is None else state.to(dtype).mT.contiguous(),
            output_final_state=True,
        )
        if inputs.D is not None:
            y = y.to(dtype) + inputs.D.to(dtype).unsqueeze(-1) * values
    return y.to(x.dtype), state.to(dtype).mT.contiguous()


@cache
def library_kernels() -> Callable[..., Any]:
    """`chunk_simple_gla`; MmmambaError if it cannot be imported."""
    try:
        kernels: Callable[..., Any] = importlib.import_module(KERNELS).chunk_simple_gla
    except (ImportError, AttributeError) as error:
        raise MmmambaError(
            f"ssd: the fla backend cannot be imported: {error}",
            hint="pip install fla-core, or leave the backend on auto",
        ) from error
    return kernels
