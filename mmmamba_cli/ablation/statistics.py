"""Intervals over seeds, and paired differences between arms.

Over seeds: mean and Student's t interval. Between arms: percentile bootstrap of the difference
(Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13), paired by seed and by unit
(the questions of a picture), in two levels: every replicate draws the seeds that both arms have,
and the units of each of them. Legend: R replicates, N seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from mmmamba_cli.evaluate.bootstrap import resample_counts
from mmmamba_cli.evaluate.scoring import UnitScores

LEVEL = 0.95
NUM_REPLICATES = 10_000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Difference:
    """The mean difference to the base, and its interval."""

    value: float
    low: float
    high: float

    @property
    def separated(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.low <= 0 <= self.high


def t_interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % t interval of the mean; None for a single value."""
    count = len(values)
    if count < 2:
        return None
    deviation = float(np.std(values, ddof=1))
    return t_quantile(count - 1) * deviation / math.sqrt(count)


@cache
def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection of its distribution function."""
    low, high = 0.0, 20.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _central_probability(middle, freedom) < LEVEL:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _central_probability(t: float, freedom: int) -> float:
    """P(|T| < t) for `freedom` degrees, by the finite series of Abramowitz and Stegun 26.7.3, 4."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(freedom // 2):
        total += term
        step = (2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2)
        term *= step * cosine**2
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def replicates(
    cells: Mapping[str, UnitScores], metric: str, draws: int = NUM_REPLICATES
) -> dict[str, np.ndarray]:
    """The metric of each cell over the same `draws` resamples of units, each (R,).

    All cells must have the same units.
    """
    strata = next(iter(cells.values())).strata
    if any(one.strata != strata for one in cells.values()):
        raise ValueError("the scores are not of the same rows")
    found: dict[str, list[np.ndarray]] = {name: [] for name in cells}
    for counts in resample_counts(strata, draws, BOOTSTRAP_SEED):
        for name, scores in cells.items():
            found[name].append(scores.metrics(counts @ scores.numbers)[metric])
    return {name: np.concatenate(values) for name, values in found.items()}


def paired_difference(values: Sequence[float], resampled: Sequence[np.ndarray]) -> Difference:
    """The interval of a difference between two arms.

    `values` (N,) are the differences of the seeds, `resampled` their replicates, N of (R,).
    """
    rows = np.stack(resampled)
    count, draws = rows.shape
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
    means = (weights.T * rows).sum(0)
    edge = 50 * (1 - LEVEL)
    low, high = np.percentile(means, [edge, 100 - edge])
    return Difference(float(np.mean(values)), float(low), float(high))
