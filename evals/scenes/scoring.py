"""The scoring rule of composed scenes: accuracy of every category, and their mean.

An answer is yes or no if exactly one of the two words occurs in it (VLMEvalKit's rule); any other
answer is wrong. accuracy+ is the share of pictures with all questions of a category right, as in
MME; F1 is POPE's, for the splits that ask for objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.chance import YES_NO_CHANCE
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores, safe_divide, strata_of, sum_by_unit
from mmmamba_cli.evaluate.scoring.yes_no import read_words
from mmmamba_evals.scenes.categories import SPLITS

# Sums per category: right rows, rows, pictures all right, pictures, true positives, false
# positives, false negatives.
SUMS_PER_CATEGORY = 7


def accuracy_by_category(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """Accuracy x 100 of every category; the headline is their mean."""
    said = [read_words(answer) for answer in answers]
    names = list(dict.fromkeys(row.category for row in rows))
    column = {name: i for i, name in enumerate(names)}
    numbers = np.zeros((len(rows), len(names), SUMS_PER_CATEGORY))
    for i, (row, answer) in enumerate(zip(rows, said, strict=True)):
        true, claimed = row.answer.lower() == "yes", answer == "yes"
        yes = (true and claimed, claimed and not true, true and not claimed)
        numbers[i, column[row.category]] = (row.answer.lower() == answer, 1, 0, 0, *yes)
    units = [row.unit for row in rows]
    summed, unit_names = sum_by_unit(units, numbers.reshape(len(rows), -1))
    parts = summed.reshape(len(unit_names), len(names), SUMS_PER_CATEGORY)
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
        chance=dict.fromkeys(("mean", *names), YES_NO_CHANCE),
    )


def _metrics(names: Sequence[str]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The mean and each category, so that each has a confidence interval."""

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        parts = sums.reshape(*sums.shape[:-1], len(names), SUMS_PER_CATEGORY)
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
