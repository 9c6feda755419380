"""How far a score may be off: drawing the units of a suite again, with replacement.

Percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13). Two
models that answered the same questions are drawn together, so that what both find hard cancels.
Legend: U units, S numbers of a unit, R draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mmmamba_cli.evaluate.scoring.metrics import Tally

DRAWS = 1000
LEVEL = 0.95
# Draws whose counts of units are in memory at a time.
BLOCK = 50


def draw_counts(strata: Sequence[str], draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (up to BLOCK, U) of how often each unit is drawn; every stratum keeps its size."""
    rng = np.random.default_rng(seed)
    members = {name: np.flatnonzero([s == name for s in strata]) for name in sorted(set(strata))}
    for start in range(0, draws, BLOCK):
        size = min(BLOCK, draws - start)
        counts = np.zeros((size, len(strata)))
        for places in members.values():
            even = np.full(len(places), 1 / len(places))
            counts[:, places] = rng.multinomial(len(places), even, size=size)
        yield counts


def intervals(tally: Tally, draws: int = DRAWS, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The interval of each metric that something was asked about."""
    asked = {name for name, value in tally.values().items() if value is not None}
    found: dict[str, list[np.ndarray]] = {}
    for counts in draw_counts(tally.strata, draws, seed):
        for name, values in tally.metrics(counts @ tally.numbers).items():
            if name in asked:
                found.setdefault(name, []).append(values)
    return {name: _percentiles(np.concatenate(values)) for name, values in found.items()}


def ratio_interval(
    upper: Tally, lower: Tally, metric: str, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float] | None:
    """The interval of upper / lower, drawn together; None if `lower` is 0 in some draw.

    Both tallies must be of the same rule and rows.
    """
    if upper.strata != lower.strata:
        raise ValueError("the tallies are not of the same rows")
    ratios = []
    for counts in draw_counts(upper.strata, draws, seed):
        above = upper.metrics(counts @ upper.numbers)[metric]
        below = lower.metrics(counts @ lower.numbers)[metric]
        if np.any(below == 0):
            return None
        ratios.append(above / below)
    return _percentiles(np.concatenate(ratios))


def difference_interval(
    one: Tally, other: Tally, metric: str, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The interval of one - other, drawn together; both must be of the same rule and rows."""
    if one.strata != other.strata:
        raise ValueError("the tallies are not of the same rows")
    found = []
    for counts in draw_counts(one.strata, draws, seed):
        left = one.metrics(counts @ one.numbers)[metric]
        right = other.metrics(counts @ other.numbers)[metric]
        found.append(left - right)
    return _percentiles(np.concatenate(found))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    edge = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [edge, 100 - edge])
    return float(low), float(high)
