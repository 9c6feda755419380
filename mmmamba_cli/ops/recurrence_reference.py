"""The reference of delta rules and gated linear attention, token by token, with autograd.

Legend: B batch, T tokens, H query heads, K key/value heads, G = H / K, P value dim, N key dim.
Query head h reads key/value head h // G. All arithmetic is fp32, or fp64 if v is fp64; autocast is
disabled inside.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmmamba_cli.ops.backends import without_autocast
from mmmamba_cli.ops.recurrence import RecurrenceInputs, initial_state, prepared_tokens


class Token(NamedTuple):
    """One token of all rows, with query heads by key/value head, in the compute dtype.

    v (B, K, P), k (B, K, N), q (B, K, G, N), decay (B, K, G, 1 or N) and beta (B, K, G).
    """

    v: Tensor
    k: Tensor
    q: Tensor
    decay: Tensor
    beta: Tensor | None


# From the state (B, K, G, P, N) before a token and the token: y (B, K, G, P) and the state after.
Update = Callable[[Tensor, Token], tuple[Tensor, Tensor]]


def run_tokens(inputs: RecurrenceInputs, update: Update) -> tuple[Tensor, Tensor]:
    """Update the state token by token; shapes as in `ops.delta_rule`."""
    v, heads = inputs.v, (inputs.v.shape[2], -1)
    with without_autocast(v):
        tokens = _by_kv_head(inputs)
        columns = [[None] * v.shape[1] if part is None else part.unbind(1) for part in tokens]
        state = initial_state(inputs).unflatten(1, heads)
        outputs = []
        for parts in zip(*columns, strict=True):
            y_t, state = update(state, Token(*parts))
            outputs.append(y_t)
        y = torch.stack(outputs, dim=1).flatten(2, 3)
    return y.to(v.dtype), state.flatten(1, 2)


def run_token(inputs: RecurrenceInputs, update: Update) -> tuple[Tensor, Tensor]:
    """Update the state by one token; `inputs` have no dimension of tokens."""
    v, heads = inputs.v, (inputs.v.shape[1], -1)
    with without_autocast(v):
        token = _by_kv_head(inputs)
        y, state = update(initial_state(inputs).unflatten(1, heads), token)
    return y.flatten(1, 2).to(v.dtype), state.flatten(1, 2)


def _by_kv_head(inputs: RecurrenceInputs) -> Token:
    """The prepared tokens; with a dimension T after B if `inputs` have one."""
    tokens, heads = prepared_tokens(inputs), (inputs.v.shape[-2], -1)
    return Token(
        tokens.v,
        tokens.k,
        tokens.q.unflatten(-2, heads),
        tokens.log_decay.exp().unflatten(-2, heads),
        None if tokens.beta is None else tokens.beta.unflatten(-1, heads),
    )
