"""The scan on mamba_ssm's Triton kernels (state-spaces/mamba, `ssd_combined.py`).

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim. There x has
H heads, and groups of them share B and C; here a group shares x and B, and C has H heads. So x and
B are repeated to H heads, each a group of its own.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import compute_dtype, repeat_heads, segment_ordinals
from mmmamba_cli.ops.ssd.dispatch import Scan, refuse
from mmmamba_cli.ops.ssd.reference import blank_padding, real_step_sizes, without_autocast

LIBRARY = "mamba_ssm"
KERNELS = f"{LIBRARY}.ops.triton.ssd_combined"
CHUNK = 128
UNBOUNDED = (-float("inf"), float("inf"))


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
    """Shapes as in `ops.ssd`; chunks have the length its kernels are tuned for."""
    refuse("mamba_ssm", Scan(x, dt, A, B, C, dt_bias, D, initial_state, seq_idx))
    kernels = library_kernels()
    share = C.shape[2] // x.shape[2]
    # Its numbering of sequences is ours: the initial state is that of sequence 0.
    segments = None if seq_idx is None else segment_ordinals(seq_idx, mask).int()
    dtype = compute_dtype(x)
    with without_autocast(x):
        x, dt, B, C = blank_padding(mask, x, dt, B, C)
        # Its kernels know no padding: a step size of exactly 0, which no bias and no softplus
        # gives, leaves the state alone. Nor may they cut off steps below 0.
        steps = real_step_sizes(dt.to(dtype), dt_bias, dt_softplus, mask)
        y, state = kernels(
            repeat_heads(x, share),
            steps,
            A.to(dtype),
            repeat_heads(B, share),
            C,
            CHUNK,
            D=D,
            initial_states=initial_state,
            seq_idx=segments,
            dt_softplus=False,
            dt_limit=UNBOUNDED,
            return_final_states=True,
        )
    return y.to(x.dtype), state.to(dtype)


@cache
def library_kernels() -> Callable[..., Any]:
    """`mamba_chunk_scan_combined`; MmmambaError where it cannot be imported."""
    try:
        try:
            module = importlib.import_module(KERNELS)
        except ImportError:
            module = _without_parent()
        return module.mamba_chunk_scan_combined
    except (ImportError, AttributeError) as error:
        raise MmmambaError(
            f"ssd: the mamba_ssm backend cannot be imported: {error}",
            hint="docs/install.md says how to build it, or leave the backend on auto",
        ) from error


def _without_parent() -> ModuleType:
    """The kernels of a build without CUDA extension, where `import mamba_ssm` itself fails.

    For as long as that takes an empty package stands in for it. It does not stay: whoever imports
    mamba_ssm afterwards is told what is missing.
    """
    spec = importlib.util.find_spec(LIBRARY)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{LIBRARY} is no package")
    parent = ModuleType(LIBRARY)
    parent.__path__ = list(spec.submodule_search_locations)
    before = sys.modules.get(LIBRARY)
    sys.modules[LIBRARY] = parent
    try:
        return importlib.import_module(KERNELS)
    finally:
        if before is None:
            del sys.modules[LIBRARY]
        else:
            sys.modules[LIBRARY] = before
