"""Results of scoring rules: additive sums per unit, and metrics computed from their totals.

A *unit* is the resampling unit of the bootstrap: the questions about one picture, or the turns of
one question. Legend: U units, S sums per unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Sums (..., S) -> metrics by name, each (...); NaN for a metric without rows. The first metric is
# the headline.
Metrics = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class UnitScores:
    """The scores of all units by one rule.

    `numbers` (U, S) float64 are the sums of each unit; units are resampled within their stratum.
    `counts` are numbers of rows. `unreadable` are the indexes of rows whose answer could not be
    parsed.
    """

    numbers: np.ndarray
    metrics: Metrics
    strata: tuple[str, ...]
    counts: Mapping[str, int]
    categories: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    # Expected scores of random guesses, by metric; none where they are unknown.
    chance: Mapping[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float | None]:
        """Every metric over all units; None for a metric without rows."""
        found = self.metrics(self.numbers.sum(0))
        return {name: None if np.isnan(value) else float(value) for name, value in found.items()}

    @property
    def headline(self) -> str:
        """The name of the first metric with a value; the first metric if none has."""
        values = self.values()
        return next(
            (name for name, value in values.items() if value is not None), next(iter(values))
        )


# The former name, for scoring rules of other packages; it goes with the next release.
Tally = UnitScores


def safe_divide(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """upper / lower, and 0 where `lower` is 0."""
    safe = np.where(lower == 0, 1, lower)
    return np.where(lower == 0, 0.0, upper / safe)


def sum_by_unit(units: Sequence[str], numbers: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Sum rows (R, S) into units (U, S), in order of first appearance."""
    names = list(dict.fromkeys(units))
    place = {name: i for i, name in enumerate(names)}
    summed = np.zeros((len(names), numbers.shape[1]))
    np.add.at(summed, [place[unit] for unit in units], numbers)
    return summed, names


def strata_of(units: Sequence[str], labels: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """The stratum of each unit in `names`: the sorted labels of its rows, joined."""
    found: dict[str, list[str]] = {}
    for unit, label in zip(units, labels, strict=True):
        seen = found.setdefault(unit, [])
        if label not in seen:
            seen.append(label)
    return tuple("|".join(sorted(found[name])) for name in names)


def accuracy_scores(
    points: Sequence[float],
    units: Sequence[str],
    labels: Sequence[str],
    unreadable: Sequence[str] = (),
    name: str = "accuracy",
) -> UnitScores:
    """Mean points x 100, overall and per category label ("" for none)."""
    categories = sorted({label for label in labels if label})
    numbers = np.zeros((len(points), 2))
    numbers[:, 0], numbers[:, 1] = points, 1
    summed, names = sum_by_unit(units, numbers)
    found: dict[str, dict[str, float]] = {}
    for category in categories:
        mine = [p for p, label in zip(points, labels, strict=True) if label == category]
        found[category] = {name: 100 * sum(mine) / len(mine), "rows": len(mine)}
    right = sum(p > 0 for p in points)
    return UnitScores(
        numbers=summed,
        metrics=lambda s: {name: 100 * safe_divide(s[..., 0], s[..., 1])},
        strata=("",) * len(names),
        counts={
            "right": int(right),
            "wrong": len(points) - int(right) - len(unreadable),
            "unreadable": len(unreadable),
        },
        categories=found,
        unreadable=tuple(unreadable),
    )
