"""Random inputs of the delta rules and GLA by one interface, and an oracle of all of them.

The oracle is a loop over one row and its heads in float64 numpy. It has no padding or packing: each
sequence of real tokens is run separately.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from ops_cases import sequences
from torch import Tensor

from mmmamba_cli import ops

TOKENS = ("v", "k", "q", "log_decay", "beta")
BACKENDS_AND_CHUNKS = pytest.mark.parametrize(
    ("backend", "chunk_size"), [("recurrent", 64), ("chunked", 1), ("chunked", 8), ("chunked", 64)]
)


@dataclass
class Recurrence:
    """Tensor arguments of `delta_rule` ("delta", "kda") or `gla`; None for omitted ones."""

    kind: str
    v: Tensor
    k: Tensor
    q: Tensor
    log_decay: Tensor
    beta: Tensor | None = None
    initial_state: Tensor | None = None

    @property
    def op(self) -> str:
        return "gla" if self.kind == "gla" else "delta_rule"

    def tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value for name, value in named.items() if value is not None}

    def changed(self, function: Any) -> "Recurrence":
        return Recurrence(self.kind, **{n: function(t) for n, t in self.tensors().items()})

    def to(self, dtype: torch.dtype) -> "Recurrence":
        return self.changed(lambda tensor: tensor.to(dtype))

    def with_gradients(self) -> "Recurrence":
        return self.changed(lambda tensor: tensor.detach().clone().requires_grad_())

    def gradients(self) -> dict[str, Tensor]:
        return {name: value.grad for name, value in self.tensors().items()}

    def span(self, row: int, columns: Tensor) -> "Recurrence":
        """The given columns of one row, with its initial state."""
        rows = slice(row, row + 1)
        kept = {
            name: value[rows][:, columns] if name in TOKENS else value[rows]
            for name, value in self.tensors().items()
        }
        return Recurrence(self.kind, **kept)

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        return getattr(ops, self.op)(**self.tensors(), **options)

    def step(self, t: int, state: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        one = {name: value[:, t] for name, value in self.tensors().items() if name in TOKENS}
        return getattr(ops, f"{self.op}_step")(**one, state=state, **options)

    def matrix(self, **options: Any) -> Tensor:
        given = {n: t for n, t in self.tensors().items() if n not in ("v", "initial_state")}
        return getattr(ops, f"{self.op}_matrix")(**given, **options)


def make_recurrence(
    kind: str,
    seed: int,
    *,
    batch: int = 2,
    length: int = 7,
    kv_heads: int = 2,
    groups: int = 2,
    value_dim: int = 4,
    state_dim: int = 5,
    optional: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Recurrence:
    """Random inputs with log decays from -e^-9 to -e^2 and keys of norm 1."""
    rng = torch.Generator().manual_seed(seed)
    heads = kv_heads * groups

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    channels = () if kind == "delta" else (state_dim,)
    case = Recurrence(
        kind,
        normal(batch, length, kv_heads, value_dim),
        torch.nn.functional.normalize(normal(batch, length, kv_heads, state_dim), dim=-1),
        normal(batch, length, heads, state_dim),
        -(11 * uniform(batch, length, heads, *channels) - 9).exp(),
    )
    if kind != "gla":
        case.beta = uniform(batch, length, heads)
    if optional:
        case.initial_state = normal(batch, heads, value_dim, state_dim)
    return case.to(dtype)


def recurrence_oracle(
    case: Recurrence, mask: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, P) and final state (B, H, P, N), with each sequence run separately."""
    batch, length, heads, key_dim = case.q.shape
    value_dim = case.v.shape[3]
    y = torch.zeros(batch, length, heads, value_dim, dtype=torch.float64)
    finals = torch.zeros(batch, heads, value_dim, key_dim, dtype=torch.float64)
    for row in range(batch):
        for number, columns in enumerate(sequences(mask, seq_idx, row, length)):
            state = np.zeros((heads, value_dim, key_dim))
            if number == 0 and case.initial_state is not None:
                state = case.initial_state[row].detach().double().numpy().copy()
            outputs, state = _one_sequence(case, row, columns, state)
            y[row, columns] = torch.from_numpy(outputs)
            finals[row] = torch.from_numpy(state)
    return y, finals


def _one_sequence(case: Recurrence, row: int, columns: Tensor, state: np.ndarray):
    v, k, q, log_decay = (
        t[row].detach().double().numpy() for t in (case.v, case.k, case.q, case.log_decay)
    )
    heads, groups = q.shape[1], q.shape[1] // v.shape[1]
    outputs = np.zeros((len(columns), heads, v.shape[2]))
    for out, t in enumerate(columns.tolist()):
        for h in range(heads):
            value, key = v[t, h // groups], k[t, h // groups]
            state[h] = state[h] * np.exp(log_decay[t, h])
            if case.beta is not None:
                value = float(case.beta[row, t, h]) * (value - state[h] @ key)
            state[h] += np.outer(value, key)
            outputs[out, h] = state[h] @ q[t, h] / np.sqrt(q.shape[2])
    return outputs, state
