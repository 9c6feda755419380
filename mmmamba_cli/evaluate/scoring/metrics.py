"""What a scoring rule returns: numbers that add up over units, and what is read off their sums.

A *unit* is what is drawn again as a whole when a score's error is estimated: the questions about
one picture, or the turns of one question. Legend: U units, S numbers of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Sums (..., S) -> each metric, (...). It is NaN where nothing was asked that it is about. The first
# metric is what the rule is known by.
Metrics = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class UnitScores:
    """Answers counted by one rule.

    `numbers` (U, S) float64; units are drawn again within their stratum. `counts` are of rows.
    `unreadable` are indexes of rows whose answer the rule could not make sense of.
    """

    numbers: np.ndarray
    metrics: Metrics
    strata: tuple[str, ...]
    counts: Mapping[str, int]
    categories: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def values(self) -> dict[str, float | None]:
        """Every metric of all units together; None where nothing was asked that it is about."""
        found = self.metrics(self.numbers.sum(0))
        return {name: None if np.isnan(value) else float(value) for name, value in found.items()}

    @property
    def headline(self) -> str:
        """The first metric that something was asked about; the first one if there is none."""
        values = self.values()
        return next(
            (name for name, value in values.items() if value is not None), next(iter(values))
        )


def safe_divide(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """upper / lower, and 0 where lower is 0."""
    safe = np.where(lower == 0, 1, lower)
    return np.where(lower == 0, 0.0, upper / safe)


def sum_by_unit(units: Sequence[str], numbers: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Sum rows (R, S) into units (U, S), in the order in which units first appear."""
    names = list(dict.fromkeys(units))
    place = {name: i for i, name in enumerate(names)}
    summed = np.zeros((len(names), numbers.shape[1]))
    np.add.at(summed, [place[unit] for unit in units], numbers)
    return summed, names


def strata_of(units: Sequence[str], labels: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """For each unit in `names`, the labels of its rows, joined."""
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
    """Mean points x 100, overall and for each category label (a row without one has "")."""
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
