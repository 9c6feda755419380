"""Delta rules and gated linear attention on flash-linear-attention (fla-org), forward only.

Legend: B batch, T tokens, H query heads, K key/value heads, P value dim, N key dim. In fla the
state is (N, P) and q, k and v all have H heads.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import compute_dtype, repeat_heads, without_autocast
from mmmamba_cli.ops.recurrence import RecurrenceInputs, prepared_tokens
from mmmamba_cli.ops.recurrence_dispatch import check_supported


def scan(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Run `ops.delta_rule` or `ops.gla`; raises MmmambaError for what `LIMITS` excludes."""
    check_supported("fla", inputs)
    kernels = library_kernels(inputs.op, _module_and_function(inputs))
    v, state, dtype = inputs.v, inputs.initial_state, compute_dtype(inputs.v)
    group_size = inputs.q.shape[2] // v.shape[2]
    with without_autocast(v):
        # The kernels multiply by the scale in fp32; q times the scale would be rounded to bf16.
        tokens = prepared_tokens(inputs._replace(scale=1.0))
        per_head = inputs.log_decay.dim() < inputs.q.dim()
        y, state = kernels(
            q=tokens.q.to(v.dtype),
            k=repeat_heads(tokens.k.to(v.dtype), group_size),
            v=repeat_heads(tokens.v.to(v.dtype), group_size),
            g=tokens.log_decay.squeeze(-1) if per_head else tokens.log_decay,
            scale=inputs.q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale,
            initial_state=None if state is None else state.to(dtype).mT.contiguous(),
            output_final_state=True,
            **({} if tokens.beta is None else {"beta": tokens.beta}),
        )
    return y.to(v.dtype), state.to(dtype).mT.contiguous()


def _module_and_function(inputs: RecurrenceInputs) -> tuple[str, str]:
    if inputs.beta is None:
        return "fla.ops.gla", "chunk_gla"
    if inputs.log_decay.dim() == inputs.q.dim():
        return "fla.ops.kda", "chunk_kda"
    return "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"


@cache
def library_kernels(op: str, names: tuple[str, str]) -> Callable[..., Any]:
    """The function of fla for `op`; MmmambaError if it cannot be imported."""
    module, function = names
    try:
        kernels: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise MmmambaError(
            f"{op}: the fla backend cannot be imported: {error}",
            hint="pip install fla-core, or leave the backend on auto",
        ) from error
    return kernels
