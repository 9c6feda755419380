"""Random inputs for the op tests, and oracles that share no code with the references.

The oracles are loops over one row and its heads in float64 numpy. They have no padding or packing:
each sequence of real tokens is run separately.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

# Scan backends that run on any device and in fp64; the kernels have separate tests.
REFERENCES = ("chunked", "recurrent")


@dataclass
class Scan:
    """Tensor arguments of `ssd`; None for omitted ones."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None = None
    D: Tensor | None = None
    initial_state: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, dtype: torch.dtype) -> "Scan":
        return Scan(**{name: value.to(dtype) for name, value in self.tensors().items()})

    def with_gradients(self) -> "Scan":
        return Scan(**{n: v.detach().clone().requires_grad_() for n, v in self.tensors().items()})

    def gradients(self) -> dict[str, Tensor]:
        return {name: value.grad for name, value in self.tensors().items()}

    def span(self, row: int, columns: Tensor | slice) -> "Scan":
        """The given columns of one row, with its initial state."""
        rows, kept = slice(row, row + 1), self.tensors()
        for name in ("x", "dt", "B", "C"):
            kept[name] = kept[name][rows][:, columns]
        if self.initial_state is not None:
            kept["initial_state"] = self.initial_state[rows]
        return Scan(**kept)


def make_scan(
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
) -> Scan:
    """Random inputs whose step sizes, after softplus, range from e^-9 to 8."""
    rng = torch.Generator().manual_seed(seed)
    heads = kv_heads * groups

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=rng, dtype=torch.float64)

    scan = Scan(
        normal(batch, length, kv_heads, value_dim),
        uniform(-9.0, 8.0, batch, length, heads),
        -uniform(0.01, 6.0, heads),
        normal(batch, length, kv_heads, state_dim),
        normal(batch, length, heads, state_dim),
    )
    if optional:
        scan.dt_bias = normal(heads)
        scan.D = normal(heads)
        scan.initial_state = normal(batch, heads, value_dim, state_dim)
    return scan.to(dtype)


def sizes(**least: int) -> st.SearchStrategy[dict[str, int]]:
    """Sizes of `make_scan`, from 1 or from `least`."""
    most = {"batch": 3, "length": 40, "kv_heads": 3, "groups": 3, "value_dim": 6, "state_dim": 6}
    return st.fixed_dictionaries(
        {name: st.integers(least.get(name, 1), high) for name, high in most.items()}
    )


seeds = st.integers(0, 2**31)
chunk_sizes = st.integers(1, 50)


@st.composite
def masks(draw: st.DrawFn, batch: int, length: int) -> Tensor:
    """(B, T) bool: left, right or scattered padding, up to whole rows."""
    rows = []
    for _ in range(batch):
        kind = draw(st.sampled_from(["left", "right", "holes"]))
        if kind == "holes":
            rows.append(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        else:
            real = draw(st.integers(0, length))
            row = [False] * (length - real) + [True] * real
            rows.append(row if kind == "left" else row[::-1])
    return torch.tensor(rows).view(batch, length)


@st.composite
def packings(draw: st.DrawFn, batch: int, length: int) -> Tensor:
    """(B, T) int64 ids in runs; an id may recur for another sequence."""
    one = st.integers(-1, 2)
    rows = []
    for _ in range(batch):
        row: list[int] = []
        while len(row) < length:
            row += [draw(one)] * draw(st.integers(1, length))
        rows.append(row[:length])
    return torch.tensor(rows)


def sequences(mask: Tensor | None, seq_idx: Tensor | None, row: int, length: int) -> list[Tensor]:
    """Columns of each sequence of real tokens in a row; one empty sequence for a row of padding."""
    spans: list[list[int]] = [[]]
    for t in range(length):
        if mask is not None and not mask[row, t]:
            continue
        if seq_idx is not None and spans[-1] and seq_idx[row, t] != seq_idx[row, spans[-1][-1]]:
            spans.append([])
        spans[-1].append(t)
    return [torch.tensor(span, dtype=torch.long) for span in spans]


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in float64; 0 for two zeros."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape
    difference = (a - b).norm()
    return 0.0 if difference == 0 else float(difference / b.norm())


def scan_one_row(scan: Scan, row: int, columns: Tensor, state: np.ndarray, dt_softplus: bool):
    """y (len, H, P) and the state (H, P, N) after running the recurrence over `columns`."""
    x, dt, A, B, C = (
        t.detach().double().numpy() for t in (scan.x, scan.dt, scan.A, scan.B, scan.C)
    )
    heads, groups = C.shape[2], C.shape[2] // x.shape[2]
    state = state.copy()
    outputs = np.zeros((len(columns), heads, x.shape[3]))
    for out, t in enumerate(columns.tolist()):
        for h in range(heads):
            k = h // groups
            delta = dt[row, t, h] + (0 if scan.dt_bias is None else float(scan.dt_bias[h]))
            if dt_softplus:
                delta = np.logaddexp(delta, 0)
            state[h] = np.exp(delta * A[h]) * state[h] + delta * np.outer(
                x[row, t, k], B[row, t, k]
            )
            outputs[out, h] = state[h] @ C[row, t, h]
            if scan.D is not None:
                outputs[out, h] += float(scan.D[h]) * x[row, t, k]
    return outputs, state


def scan_oracle(
    scan: Scan,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    *,
    dt_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, P) and final state (B, H, P, N), with each sequence run separately."""
    batch, length, heads, state_dim = scan.C.shape
    value_dim = scan.x.shape[3]
    y = torch.zeros(batch, length, heads, value_dim, dtype=torch.float64)
    finals = torch.zeros(batch, heads, value_dim, state_dim, dtype=torch.float64)
    for row in range(batch):
        state = np.zeros((heads, value_dim, state_dim))
        if scan.initial_state is not None:
            state = scan.initial_state[row].detach().double().numpy()
        for number, columns in enumerate(sequences(mask, seq_idx, row, length)):
            begin = state if number == 0 else np.zeros_like(state)
            outputs, last = scan_one_row(scan, row, columns, begin, dt_softplus)
            y[row, columns] = torch.from_numpy(outputs)
            finals[row] = torch.from_numpy(last)
    return y, finals


def quadratic_oracle(scan: Scan) -> Tensor:
    """y (B, T, H, P) as masked attention, without initial state, bias, softplus and D.

    y = (L o C B^T) diag(dt) x with L_ij = exp(dt_{j+1} A + ... + dt_i A) for j <= i, else 0
    (arXiv 2405.21060, equation 16).
    """
    groups = scan.C.shape[2] // scan.x.shape[2]
    x, B = scan.x.repeat_interleave(groups, 2), scan.B.repeat_interleave(groups, 2)
    length = x.shape[1]
    y = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for h in range(x.shape[2]):
            rates = scan.dt[row, :, h] * scan.A[h]
            decay = torch.zeros(length, length, dtype=x.dtype)
            for i in range(length):
                for j in range(i + 1):
                    decay[i, j] = rates[j + 1 : i + 1].sum().exp()
            scores = decay * (scan.C[row, :, h] @ B[row, :, h].T)
            y[row, :, h] = scores @ (scan.dt[row, :, h, None] * x[row, :, h])
    return y
