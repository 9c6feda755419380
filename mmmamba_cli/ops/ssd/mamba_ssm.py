"""The scan on mamba_ssm's Triton kernels (state-spaces/mamba, `ssd_combined.py`).

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N state dim. In mamba_ssm
x has H heads and groups of heads share B and C; here a group shares x and B, and C has H heads.
So x and B are repeated to H heads, with one group per head.
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
from mmmamba_cli.ops.backends import (
    compute_dtype,
    repeat_heads,
    segment_ordinals,
    without_autocast,
)
from mmmamba_cli.ops.ssd.dispatch import check_supported
from mmmamba_cli.ops.ssd.reference import ScanInputs, masked_tokens

LIBRARY = "mamba_ssm"
KERNELS = f"{LIBRARY}.ops.triton.ssd_combined"
# The chunk size in tokens that its kernels are tuned for.
CHUNK_SIZE = 128


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Run `ops.ssd`; raises MmmambaError for inputs that `LIMITS` excludes."""
    check_supported("mamba_ssm", inputs)
    kernels = library_kernels()
    dtype = compute_dtype(inputs.x)
    segments = None
    if inputs.seq_idx is not None:
        # mamba_ssm also gives the initial state to sequence 0.
        segments = segment_ordinals(inputs.seq_idx, inputs.mask).int()
    with without_autocast(inputs.x):
        # The kernels have no padding mask. They get final step sizes, exactly 0 at padding, with
        # bias and softplus off and without their default clamping of negative steps to 0.
        x, step_sizes, B, C = masked_tokens(inputs)
        y, state = kernels(
            repeat_heads(x, inputs.group_size),
            step_sizes,
            inputs.A.to(dtype),
            repeat_heads(B, inputs.group_size),
            C,
            CHUNK_SIZE,
            D=inputs.D,
            initial_states=inputs.initial_state,
            seq_idx=segments,
            dt_softplus=False,
            dt_limit=(-float("inf"), float("inf")),
            return_final_states=True,
        )
    return y.to(x.dtype), state.to(dtype)


@cache
def library_kernels() -> Callable[..., Any]:
    """`mamba_chunk_scan_combined`; MmmambaError if it cannot be imported."""
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
    """Import the kernels of a build without CUDA extension, where `import mamba_ssm` fails.

    An empty package stands in for `mamba_ssm` during the import and is removed afterwards, so that
    a later `import mamba_ssm` still reports the missing extension.
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
