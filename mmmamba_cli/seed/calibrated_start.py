"""A calibrated start: the decay and a constant gate of each mixer, fitted to the teacher's outputs.

Nothing is trained: one walk through the teacher, layer by layer, gives sums in closed form. Decays
are chosen by search, as the look-back times of Taylor-Calibrate (arXiv 2606.16429) describe the
teacher's attention less well than what a decay explains of its output. Legend: B rows, T columns, N
columns without padding, D hidden size, H heads, P head dim, C candidate decays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.model.gated_mixer import GATED_NORM_EPS
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops.backends import upcast

# Half-lives in columns that each head may have. The last stands for no decay at all, of which
# A_log has no finite value.
HALF_LIVES = (0.7, 2.0, 6.0, 16.0, 48.0, 150.0, 500.0, 2000.0, 1e5)
# One head of so many keeps a long memory, of which short samples show no use.
HEADS_PER_LONG_MEMORY = 8
MIN_STEP, MAX_STEP = 1e-3, 1.0
# Ridge of the constant gate, as a share of the mean diagonal of X^T X.
RIDGE = 1e-3
# SiLU rises from -1.278, where it is -0.2785; its derivative is 0 there.
MIN_SILU, SILU_MINIMUM = -0.27, -1.278


@dataclass(frozen=True)
class LayerStart:
    """The calibrated parameters of a mixer.

    `decay` holds its vectors by name. The gate's projection is `gate_scale` (H * P,) times
    `gate_input` (D,): x . `gate_input` is about 1 for every normed hidden state x, so that the
    projection acts as the bias that it lacks.
    """

    decay: dict[str, Tensor]
    gate_scale: Tensor
    gate_input: Tensor
    half_lives: tuple[float, ...]

    def value(self, part: str) -> Tensor | None:
        """The value, fp32, of a parameter of the mixer; None if calibration leaves it as it is."""
        if part == "g_proj.weight":
            return torch.outer(self.gate_scale, self.gate_input).float()
        return self.decay.get(part)


class LayerSums:
    """Sums over the columns of a layer for every candidate decay, in fp64.

    The read-outs are those of step size 1: the norm behind the scan cancels a common factor.
    """

    def __init__(self, mixer: Any, hidden_size: int) -> None:
        shape = (len(HALF_LIVES), mixer.num_heads, mixer.head_dim)
        self._mixer = mixer
        self.products = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)
        self.mean_squares = torch.zeros(shape[:2], dtype=torch.float64)
        self.expected_squares = torch.zeros(mixer.num_heads, dtype=torch.float64)
        self.gram = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self.inputs = torch.zeros(hidden_size, dtype=torch.float64)
        self.columns = 0

    def add(self, normed: Tensor, columns: SequenceLayout, expected: Tensor) -> None:
        """Add a batch: the mixer's input (B, T, D), and the teacher's output (B, T, H * P)."""
        mixer, mask = self._mixer, columns.mask
        v, k, q, _ = mixer.values_keys_queries(normed, columns)
        target = _real_rows(expected.view(q.shape), mask).double()
        self.expected_squares += target.square().sum((0, 2))
        for number, half_life in enumerate(HALF_LIVES):
            load_decay(mixer, (half_life,) * mixer.num_heads, torch.ones(mixer.num_heads))
            y, _ = mixer.scan(v, k, q, normed, columns, None)
            y = _real_rows(y, mask).double()
            power = y.square().mean(-1)
            n = y * torch.rsqrt(power + GATED_NORM_EPS).unsqueeze(-1)
            self.mean_squares[number] += power.sum(0)
            self.products[number] += (n * target).sum(0)
            self.squares[number] += n.square().sum(0)
        x = _real_rows(normed, mask).double()
        self.gram += x.T @ x
        self.inputs += x.sum(0)
        self.columns += x.shape[0]

    def solve(self, layer: int, longest: int) -> LayerStart:
        """The start of the layer; `longest` is the number of columns of the longest row.

        Raises:
            CheckpointError: the teacher's outputs are not finite.
        """
        shares = self.explained_shares()
        if not bool(torch.isfinite(shares).all() and torch.isfinite(self.gram).all()):
            raise CheckpointError(
                f"layer {layer} of the teacher gives NaN or infinity on the calibration samples",
                "check the weights with `mmmamba inspect`",
            )
        chosen = keep_long_memories(shares * self.expected_squares, longest)
        heads = torch.arange(len(chosen))
        rms = (self.mean_squares[chosen, heads] / self.columns).sqrt()
        steps = (1 / rms.clamp(min=1e-12)).clamp(MIN_STEP, MAX_STEP)
        half_lives = tuple(HALF_LIVES[int(number)] for number in chosen)
        return LayerStart(
            decay=decay_values(self._mixer, half_lives, steps),
            gate_scale=inverse_silu(self.gates()[chosen, heads].flatten()),
            gate_input=self._constant_input(),
            half_lives=half_lives,
        )

    def explained_shares(self) -> Tensor:
        """(C, H): the share of the teacher's output that `gates` explain."""
        gates = self.gates()
        explained = (2 * gates * self.products - gates.square() * self.squares).sum(-1)
        return explained / self.expected_squares.clamp(min=1e-30)

    def gates(self) -> Tensor:
        """(C, H, P): the constant SiLU(gate) with the least squared error in each channel."""
        return (self.products / self.squares.clamp(min=1e-30)).clamp(min=MIN_SILU)

    def _constant_input(self) -> Tensor:
        """m (D,) with x . m about 1: (X^T X + ridge)^-1 X^T 1."""
        ridge = RIDGE * self.gram.diagonal().mean().clamp(min=1e-30)
        factor = torch.linalg.cholesky(self.gram + ridge * torch.eye(len(self.gram)))
        return torch.cholesky_solve(self.inputs.unsqueeze(1), factor).squeeze(1)


def keep_long_memories(explained: Tensor, longest: int) -> Tensor:
    """(H,) candidates: for each head the best, and a long memory for the heads that lose least.

    `explained` (C, H) is the part of the teacher's output that a candidate explains. One head of
    `HEADS_PER_LONG_MEMORY` gets at least the half-life that is its part of `longest`, spread evenly
    in log.
    """
    best, chosen = explained.max(0)
    long = -(-len(chosen) // HEADS_PER_LONG_MEMORY)
    free = torch.ones(len(chosen), dtype=torch.bool)
    for rank in range(long):
        wanted = longest ** ((long - rank) / long)
        floor = sum(one < wanted for one in HALF_LIVES[:-1])
        reached, candidates = explained[floor:].max(0)
        loss = torch.where(free, best - reached, math.inf)
        head = int(loss.argmin())
        chosen[head], free[head] = candidates[head] + floor, False
    return chosen


def decay_values(mixer: Any, half_lives: Sequence[float], steps: Tensor) -> dict[str, Tensor]:
    """The mixer's vectors for decays and step sizes (H,) that are the same for all tokens."""
    rates = math.log(2) / torch.tensor(half_lives, dtype=torch.float64)
    values: dict[str, Tensor] = mixer.constant_decay(rates, steps.double())
    return values


def load_decay(mixer: Any, half_lives: Sequence[float], steps: Tensor) -> None:
    mixer.load_state_dict(decay_values(mixer, half_lives, steps), strict=False)


def inverse_silu(values: Tensor) -> Tensor:
    """x with SiLU(x) = `values`, fp64, on the branch above the minimum.

    Values below `MIN_SILU` are raised to it. Bisection: Newton's step fails near the minimum.
    """
    wanted = values.double().clamp(min=MIN_SILU)
    low = torch.full_like(wanted, SILU_MINIMUM)
    high = wanted.clamp(min=0) + 1
    for _ in range(80):
        middle = (low + high) / 2
        is_below = torch.nn.functional.silu(middle) < wanted
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2


def load_start(mixer: Any, start: LayerStart) -> None:
    """Set the calibrated parameters of a mixer."""
    values = {**start.decay, "g_proj.weight": start.value("g_proj.weight")}
    mixer.load_state_dict(values, strict=False)


@dataclass
class FidelitySums:
    """Sums of cosines over columns and heads, and of squares, of one layer."""

    cosines: float = 0.0
    vectors: int = 0
    errors: float = 0.0
    squares: float = 0.0

    def add(self, actual: Tensor, expected: Tensor, mask: Tensor | None, head_dim: int) -> None:
        """Add (B, T, H * P) outputs of the student's and the teacher's mixer."""
        actual = upcast(_real_rows(actual, mask)).reshape(-1, head_dim)
        expected = upcast(_real_rows(expected, mask)).reshape(-1, head_dim)
        cosines = torch.nn.functional.cosine_similarity(actual, expected, dim=-1)
        self.cosines += float(cosines.double().sum())
        self.vectors += len(cosines)
        self.errors += float((actual - expected).double().square().sum())
        self.squares += float(expected.double().square().sum())

    @property
    def cosine(self) -> float:
        return self.cosines / self.vectors

    @property
    def relative_mse(self) -> float:
        return self.errors / self.squares


def _real_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """(N, ...): `values` (B, T, ...) without padding."""
    return values.flatten(0, 1) if mask is None else values[mask]
