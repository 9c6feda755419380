"""Rules of multiple choice: letters, options in words, versions of the rule, circular accuracy."""

from __future__ import annotations

import pytest

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring import find_rule
from mmmamba_cli.evaluate.scoring.choices import (
    SINCE_2024_02,
    SINCE_2025_08,
    SINCE_2026_06,
    choose_option,
)

OPTIONS = {"A": "a red cat", "B": "a dog", "C": "two birds", "D": "fish"}


CHOICES = [
    ("A", "A"),
    ("B.", "B"),
    ("(C)", "C"),
    ("**D**", "D"),
    ("D: fish", "D"),
    ("The answer is B", "B"),
    ("The answer is B because it barks", "B"),
    ("B is what I see in the picture here", None),
    ("A dog", "A"),
    ("It is a dog", "B"),
    ("two birds", "C"),
    ("Two Birds, I think", "C"),
    ("A or B", None),
    ("a dog or fish", None),
    ("b", None),
    ("E", None),
    ("", None),
    ("Z", "Z"),
    ("Cannot determine the answer", "Z"),
    ("选B", None),
    ("答案是 B。", None),
    ("答案是 B .", "B"),
]


@pytest.mark.parametrize(("answer", "chosen"), CHOICES)
def test_multiple_choice(answer: str, chosen: str | None) -> None:
    assert choose_option(answer, OPTIONS) == chosen


def test_long_answer_is_not_searched_for_option_text() -> None:
    text = "fish " + "x" * 60
    assert choose_option(text[:40], OPTIONS) == "D"
    assert choose_option(text, OPTIONS) is None
    # As in the kit, outer spaces count in the length of the answer.
    assert choose_option(f"{'fish':>60}", OPTIONS) is None


WORDY = [
    # Answer, and its option since June 2026, since August 2025, since February 2024.
    ("The answer is **C**. A is too small and B is of another colour.", "C", None, None),
    ("B is what I see in the picture here", None, None, "B"),
    ("fish " + "x" * 60, None, None, "D"),
    ("Correct answer is d, which swims", "D", None, None),
    ("The answer is E, as everybody sees in this picture", None, None, None),
    ("Failed to obtain answer via API. B", None, None, None),
]


@pytest.mark.parametrize(("answer", "newest", "middle", "oldest"), WORDY)
def test_versions_of_the_multiple_choice_rule(
    answer: str, newest: str | None, middle: str | None, oldest: str | None
) -> None:
    assert choose_option(answer, OPTIONS) == choose_option(answer, OPTIONS, SINCE_2026_06) == newest
    assert choose_option(answer, OPTIONS, SINCE_2025_08) == middle
    assert choose_option(answer, OPTIONS, SINCE_2024_02) == oldest


def choice(index: str, answer: str, unit: str = "", category: str = "") -> Row:
    return Row(index, "?", answer, category, OPTIONS, unit=unit or index)


def test_rows_and_circular_accuracy() -> None:
    rows = [
        choice("1", "A", "1", "x"),
        choice("1000001", "B", "1", "x"),
        choice("2", "C", "2", "y"),
        choice("1000002", "D", "2", "y"),
    ]
    answers = ["A", "B", "maybe", "D"]
    by_row = find_rule("choice_rows")(rows, answers)
    assert by_row.values() == {"accuracy": 75.0}
    circular = find_rule("choice_circular")(rows, answers)
    assert circular.values() == {"accuracy": 50.0}
    assert circular.categories == {
        "x": {"accuracy": 100.0, "rows": 1},
        "y": {"accuracy": 0.0, "rows": 1},
    }
    assert circular.counts == {"right": 3, "wrong": 0, "unreadable": 1, "questions": 2}


def test_question_without_options_is_matched_with_its_answer() -> None:
    rows = [Row(str(i), "?", "24.5", unit=str(i)) for i in range(4)]
    tally = find_rule("choice_rows")(rows, ["24.5", "about 24.5 m", "23", "B"])
    assert tally.values() == {"accuracy": 50.0}
    assert tally.unreadable == ("2",)
