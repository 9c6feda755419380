"""Bootstrap confidence intervals over units (pictures, pairs or turns).

Percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13). Two
models that answered the same questions share the resamples (paired bootstrap), so that the
difficulty of the questions cancels. Legend: U units, S sums per unit, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores

NUM_RESAMPLES = 1000
CONFIDENCE_LEVEL = 0.95
# Resamples whose unit counts are in memory at a time.
RESAMPLES_PER_BLOCK = 50


def resample_counts(strata: Sequence[str], draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks, at most (RESAMPLES_PER_BLOCK, U), of the number of times each unit is drawn.

    Stratified: every stratum keeps its size.
    """
    rng = np.random.default_rng(seed)
    members = {name: np.flatnonzero([s == name for s in strata]) for name in sorted(set(strata))}
    for start in range(0, draws, RESAMPLES_PER_BLOCK):
        size = min(RESAMPLES_PER_BLOCK, draws - start)
        counts = np.zeros((size, len(strata)))
        for places in members.values():
            even = np.full(len(places), 1 / len(places))
            counts[:, places] = rng.multinomial(len(places), even, size=size)
        yield counts


def intervals(
    scores: UnitScores, draws: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The confidence interval of each metric that has a value."""
    present = {name for name, value in scores.values().items() if value is not None}
    found: dict[str, list[np.ndarray]] = {}
    for counts in resample_counts(scores.strata, draws, seed):
        for name, values in scores.metrics(counts @ scores.numbers).items():
            if name in present:
                found.setdefault(name, []).append(values)
    return {name: _percentiles(np.concatenate(values)) for name, values in found.items()}


def ratio_interval(
    upper: UnitScores,
    lower: UnitScores,
    metric: str,
    draws: int = NUM_RESAMPLES,
    seed: int = 0,
    origin: float = 0.0,
) -> tuple[float, float] | None:
    """The paired interval of (upper - origin) / (lower - origin).

    None if `lower` is at `origin` or below in a resample. Both must have the same rule and rows.
    """
    if upper.strata != lower.strata:
        raise ValueError("the scores are not of the same rows")
    ratios = []
    for counts in resample_counts(upper.strata, draws, seed):
        above = upper.metrics(counts @ upper.numbers)[metric]
        below = lower.metrics(counts @ lower.numbers)[metric]
        if np.any(below <= origin):
            return None
        ratios.append((above - origin) / (below - origin))
    return _percentiles(np.concatenate(ratios))


def difference_interval(
    one: UnitScores, other: UnitScores, metric: str, draws: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The paired interval of one - other; both must have the same rule and rows."""
    if one.strata != other.strata:
        raise ValueError("the scores are not of the same rows")
    found = []
    for counts in resample_counts(one.strata, draws, seed):
        left = one.metrics(counts @ one.numbers)[metric]
        right = other.metrics(counts @ other.numbers)[metric]
        found.append(left - right)
    return _percentiles(np.concatenate(found))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    edge = 50 * (1 - CONFIDENCE_LEVEL)
    low, high = np.percentile(values, [edge, 100 - edge])
    return float(low), float(high)
