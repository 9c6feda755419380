"""Expected scores of random guesses, against all possible guesses, and retention above them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.score_retention import retention
from mmmamba_cli.evaluate.scoring import find_rule
from mmmamba_cli.evaluate.scoring.chance import above_chance, f1_chance
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores, accuracy_scores
from mmmamba_cli.evaluate.tables import retention_table


def yes_no_rows(answers: Sequence[str], category: str) -> list[Row]:
    return [
        Row(str(i), "Q?", answer, category, unit=f"picture {i // 2}")
        for i, answer in enumerate(answers)
    ]


def mean_over_guesses(rule: str, rows: Sequence[Row], answers: Sequence[str], metric: str) -> float:
    """The mean of a metric over every combination of `answers`, all equally likely."""
    every = itertools.product(answers, repeat=len(rows))
    values = [find_rule(rule)(rows, guess).values()[metric] for guess in every]
    return float(np.mean([value for value in values if value is not None]))


@pytest.mark.parametrize(
    ("rule", "metric", "category"),
    [
        ("mme_words", "perception", "OCR"),
        ("mme_first_letters", "reasoning", "code_reasoning"),
        ("pope_all_rows", "accuracy", "random"),
        ("mmmamba_evals.scenes.scoring:accuracy_by_category", "mean", "colour"),
    ],
)
def test_yes_and_no(rule: str, metric: str, category: str) -> None:
    rows = yes_no_rows(("Yes", "No", "No", "No"), category)
    chance = find_rule(rule)(rows, ["Yes"] * 4).chance[metric]
    assert chance == pytest.approx(mean_over_guesses(rule, rows, ("Yes", "No"), metric))


def test_options_in_rows_and_in_circles() -> None:
    options = [{"A": "cat", "B": "dog"}, {"A": "cat", "B": "dog", "C": "cow"}]
    rows = [
        Row(str(i), "Q?", "A", options=options[i % 2], unit=f"question {i % 2}") for i in range(4)
    ]
    for rule in ("choice_rows", "choice_circular"):
        found = find_rule(rule)(rows, ["A"] * 4).chance["accuracy"]
        # A guess takes one of a row's own options.
        every = itertools.product(*(row.options for row in rows))
        values = [find_rule(rule)(rows, guess).values()["accuracy"] for guess in every]
        assert found == pytest.approx(float(np.mean([float(v or 0) for v in values])))
    without = [Row("0", "Q?", "cat", unit="0")]
    assert find_rule("choice_rows")(without, ["cat"]).chance == {}
    assert find_rule("exact_plain")(without, ["cat"]).chance == {}


def test_f1_of_guesses_is_a_ratio_of_expected_counts() -> None:
    # Of 1000 rows 300 are yes; 500 are guessed yes, 150 of them rightly.
    found = f1_chance(0.3)
    assert found["F1"] == pytest.approx(100 * 2 * 150 / (2 * 150 + 350 + 150))
    assert found["precision"] == pytest.approx(100 * 150 / 500)
    splits = yes_no_rows(("Yes", "Yes", "No", "No"), "random")
    splits += yes_no_rows(("Yes", "No", "No", "No"), "popular")
    chance = find_rule("pope_mean_of_splits")(splits, ["Yes", "No"] * 4).chance
    assert chance["F1"] == pytest.approx((f1_chance(0.5)["F1"] + f1_chance(0.25)["F1"]) / 2)


def scores(right: int, rows: int, chance: float | None) -> UnitScores:
    points = [float(i < right) for i in range(rows)]
    found = accuracy_scores(points, [str(i) for i in range(rows)], [""] * rows)
    return UnitScores(**{**vars(found), "chance": {} if chance is None else {"accuracy": chance}})


def test_retention_above_chance() -> None:
    assert above_chance(60, 90, 50) == pytest.approx(0.25)
    assert above_chance(40, 90, 50) == pytest.approx(-0.25)
    assert above_chance(60, 50, 50) is None
    part = retention("s", "r", ("student", scores(60, 100, 50)), ("t", scores(90, 100, 50)), 100, 0)
    assert part.ratio == pytest.approx(60 / 90) and part.above_chance == pytest.approx(0.25)
    low, high = part.above_chance_interval or (0, 0)
    assert low < 0.25 < high
    # The interval is that of the shifted scores, not of the raw ratio.
    assert part.interval is not None and high - low > 2 * (part.interval[1] - part.interval[0])
    heading, ((*_, chance, above, span),) = retention_table([part])
    assert heading[-3:] == ("chance", "above chance", "95 % above chance")
    assert (chance, above) == ("50.00", "25.0%") and "to" in str(span)


def test_unknown_chance_has_no_retention_above_it() -> None:
    one, other = ("s", scores(6, 10, None)), ("t", scores(9, 10, None))
    part = retention("s", "r", one, other, 10, 0)
    assert part.ratio is not None and part.chance is None and part.above_chance is None
