"""How answers about composed scenes are scored: accuracy of every category, and their mean.

An answer is yes or no if just one of the two words occurs in it (VLMEvalKit's rule); anything else
is wrong. accuracy+ is the share of pictures whose questions of a category were all answered right,
as MME has it for its pairs; F1 is POPE's, for the splits that ask for objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.metrics import UnitScores, safe_divide, strata_of, sum_by_unit
from mmmamba_cli.evaluate.scoring.yes_no import read_words
from mmmamba_evals.scenes.sampling import SPLITS

# Numbers of a category: right, rows, pictures all right, pictures, true, false and missed yes.
PER_CATEGORY = 7


def accuracy_by_category(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """The headline is the mean of the categories' accuracies, each x 100."""
    said = [read_words(answer) for answer in answers]
    names = list(dict.fromkeys(row.category for row in rows))
    column = {name: i for i, name in enumerate(names)}
    numbers = np.zeros((len(rows), len(names), PER_CATEGORY))
    for i, (row, answer) in enumerate(zip(rows, said, strict=True)):
        true, claimed = row.answer.lower() == "yes", answer == "yes"
        yes = (true and claimed, claimed and not true, true and not claimed)
        numbers[i, column[row.category]] = (row.answer.lower() == answer, 1, 0, 0, *yes)
    units = [row.unit for row in rows]
    summed, unit_names = sum_by_unit(units, numbers.reshape(len(rows), -1))
    parts = summed.reshape(len(unit_names), len(names), PER_CATEGORY)
    parts[..., 3] = parts[..., 1] > 0
    parts[..., 2] = (parts[..., 0] == parts[..., 1]) & (parts[..., 1] > 0)
    unread = tuple(row.index for row, answer in zip(rows, said, strict=True) if answer is None)
    right = int(parts[..., 0].sum())
    return UnitScores(
        numbers=summed,
        metrics=_metrics(names),
        strata=strata_of(units, [row.category for row in rows], unit_names),
        counts={
            "right": right,
            "wrong": len(rows) - right - len(unread),
            "unreadable": len(unread),
        },
        categories={name: _category(name, parts[:, column[name]].sum(0)) for name in names},
        unreadable=unread,
    )


def _metrics(names: Sequence[str]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The mean, then each category: so that every one of them has its interval."""

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        parts = sums.reshape(*sums.shape[:-1], len(names), PER_CATEGORY)
        accuracy = 100 * safe_divide(parts[..., 0], parts[..., 1])
        return {
            "mean": accuracy.mean(-1),
            **{name: accuracy[..., i] for i, name in enumerate(names)},
        }

    return metrics


def _category(name: str, sums: np.ndarray) -> dict[str, float]:
    right, rows, whole, pictures, true, false, missed = map(float, sums)
    found = {"accuracy": 100 * right / rows, "accuracy+": 100 * whole / pictures}
    if name in SPLITS:
        found["F1"] = 100 * 2 * true / max(1.0, 2 * true + false + missed)
    return {**found, "rows": int(rows)}
