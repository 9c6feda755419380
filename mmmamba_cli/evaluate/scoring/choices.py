"""Multiple choice: which option an answer means, and MMBench's circular accuracy.

Source of the rules: open-compass/VLMEvalKit, vlmeval/utils/matching_util.py and
vlmeval/dataset/utils/multiple_choice.py, in its mode without a judge model ("exact_matching").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.tally import Tally, accuracy_tally

# What may stand around a letter, as in "(A)." or "**A**".
AROUND = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# A letter is believed among the last words only: "A" may be an article.
LAST_WORDS = 4
NO_CHOICE = "Z"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
OTHER_ANSWERS = "Other Answers"


def choose_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that `answer` means, `NO_CHOICE` for a refusal, None if unclear.

    By its letter if just one letter stands in the answer, within its last words; else by its text
    if the text of just one option occurs and the answer is not longer than all options twice.
    """
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str]) -> str | None:
    if any(refusal in answer for refusal in REFUSALS):
        return NO_CHOICE
    words = answer.translate(AROUND).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1:
        place = words.index(found[0])
        return found[0] if place >= len(words) - LAST_WORDS else None
    return NO_CHOICE if not found and NO_CHOICE in words else None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    text = answer.lower()
    if len(text) > 2 * sum(len(option) for option in options.values()):
        return None
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


def options_to_match(row: Row) -> tuple[dict[str, str], str]:
    """The options an answer is matched with, and the right letter.

    A question without options, as MMMU has them, is matched with its answer as A and with all
    other answers as B.
    """
    if row.options:
        return dict(row.options), row.answer
    return {"A": row.answer, "B": OTHER_ANSWERS}, "A"


def _read(rows: Sequence[Row], answers: Sequence[str]) -> tuple[list[bool], list[str]]:
    """Whether each answer is right, and the indexes of those that mean no option."""
    right, unreadable = [], []
    for row, answer in zip(rows, answers, strict=True):
        options, correct = options_to_match(row)
        chosen = choose_option(answer.strip(), options)
        right.append(chosen == correct)
        if chosen not in options:
            unreadable.append(row.index)
    return right, unreadable


def choice_rows(rows: Sequence[Row], answers: Sequence[str]) -> Tally:
    """Accuracy over rows."""
    right, unreadable = _read(rows, answers)
    return accuracy_tally(
        [float(r) for r in right],
        [row.unit for row in rows],
        [row.category for row in rows],
        unreadable,
    )


def choice_circular(rows: Sequence[Row], answers: Sequence[str]) -> Tally:
    """MMBench's accuracy: a question counts as right if it is in every order of its options."""
    right, unreadable = _read(rows, answers)
    all_right: dict[str, bool] = {}
    category: dict[str, str] = {}
    for row, is_right in zip(rows, right, strict=True):
        all_right[row.unit] = all_right.get(row.unit, True) and is_right
        category.setdefault(row.unit, row.category)
    units = list(all_right)
    tally = accuracy_tally(
        [float(all_right[unit]) for unit in units], units, [category[unit] for unit in units]
    )
    rows_right = int(np.sum(right))
    counts = {
        "right": rows_right,
        "wrong": len(rows) - rows_right - len(unreadable),
        "unreadable": len(unreadable),
        "questions": len(units),
    }
    return replace(tally, counts=counts, unreadable=tuple(unreadable))
