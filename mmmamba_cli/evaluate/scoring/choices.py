"""Multiple choice: option matching, and MMBench's circular accuracy.

Source of the rules: open-compass/VLMEvalKit, vlmeval/utils/matching_util.py and
vlmeval/dataset/utils/multiple_choice.py, in its mode without a judge model ("exact_matching"). The
kit changed its rule twice; each version is named by the month since which it applies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.chance import circular_chance, option_chance
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores, accuracy_scores

# Punctuation around a letter, as in "(A)." or "**A**", is replaced by spaces.
PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NO_CHOICE = "Z"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# The kit's placeholder for a failed API call.
NO_ANSWER = "Failed to obtain answer via API"
# As in the kit, without a word boundary: "answer is a dog" matches option A.
ANSWER_IS = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)
OTHER_ANSWERS = "Other Answers"


@dataclass(frozen=True)
class ChoiceRule:
    """One version of the kit's rule.

    `last_words`: a letter counts only among this many last words ("A" may be an article); None:
    anywhere. `limit_text`: an answer longer than twice all options together is not searched for an
    option's text. `read_answer_is`: use the letter after "answer is" if no other letter matches.
    """

    last_words: int | None = 4
    limit_text: bool = True
    read_answer_is: bool = True


SINCE_2026_06 = ChoiceRule()
SINCE_2025_08 = ChoiceRule(read_answer_is=False)
SINCE_2024_02 = ChoiceRule(last_words=None, limit_text=False, read_answer_is=False)


def choose_option(
    answer: str, options: Mapping[str, str], rule: ChoiceRule = SINCE_2026_06
) -> str | None:
    """The letter of the matched option, `NO_CHOICE` for a refusal, None if nothing matches.

    Matches the only letter in the answer; else the letter after "answer is"; else the only option
    whose text occurs. `rule` restricts each step. The answer is not stripped: outer spaces count in
    its length.
    """
    return _by_letter(answer, options, rule) or _by_text(answer, options, rule)


def _by_letter(answer: str, options: Mapping[str, str], rule: ChoiceRule) -> str | None:
    if NO_ANSWER in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return NO_CHOICE
    words = answer.translate(PUNCTUATION_TO_SPACE).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1:
        first_place = 0 if rule.last_words is None else len(words) - rule.last_words
        if words.index(found[0]) >= first_place:
            return found[0]
    elif not found and NO_CHOICE in words:
        return NO_CHOICE
    match = ANSWER_IS.search(answer) if rule.read_answer_is else None
    letter = None if match is None else match.group(1).upper()
    return letter if letter in options else None


def _by_text(answer: str, options: Mapping[str, str], rule: ChoiceRule) -> str | None:
    text = answer.lower()
    if rule.limit_text and len(text) > 2 * sum(len(option) for option in options.values()):
        return None
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


def options_to_match(row: Row) -> tuple[dict[str, str], str]:
    """The options to match an answer with, and the right letter.

    A question without options (MMMU has some) gets its answer as A and "Other Answers" as B.
    """
    if row.options:
        return dict(row.options), row.answer
    return {"A": row.answer, "B": OTHER_ANSWERS}, "A"


def _read(
    rows: Sequence[Row], answers: Sequence[str], rule: ChoiceRule
) -> tuple[list[bool], list[str]]:
    """Whether each answer is right, and the indexes of answers that match no option."""
    right, unreadable = [], []
    for row, answer in zip(rows, answers, strict=True):
        options, correct = options_to_match(row)
        chosen = choose_option(answer, options, rule)
        right.append(chosen == correct)
        if chosen not in options:
            unreadable.append(row.index)
    return right, unreadable


def choice_rows_2026_06(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """Accuracy over rows, as VLMEvalKit reads answers since June 2026."""
    return _by_row(rows, answers, SINCE_2026_06)


def choice_rows_2025_08(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """Accuracy over rows, as VLMEvalKit read answers from August 2025 to June 2026."""
    return _by_row(rows, answers, SINCE_2025_08)


def choice_rows_2024_02(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """Accuracy over rows, as VLMEvalKit read answers from February 2024 to August 2025."""
    return _by_row(rows, answers, SINCE_2024_02)


def choice_circular_2026_06(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """MMBench's accuracy, answers read as in `choice_rows_2026_06`."""
    return _circular(rows, answers, SINCE_2026_06)


def choice_circular_2025_08(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """MMBench's accuracy, answers read as in `choice_rows_2025_08`."""
    return _circular(rows, answers, SINCE_2025_08)


def choice_circular_2024_02(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """MMBench's accuracy, answers read as in `choice_rows_2024_02`."""
    return _circular(rows, answers, SINCE_2024_02)


def _by_row(rows: Sequence[Row], answers: Sequence[str], rule: ChoiceRule) -> UnitScores:
    right, unreadable = _read(rows, answers, rule)
    scores = accuracy_scores(
        [float(r) for r in right],
        [row.unit for row in rows],
        [row.category for row in rows],
        unreadable,
    )
    chance = option_chance([len(row.options) for row in rows])
    return replace(scores, chance={} if chance is None else {"accuracy": chance})


def _circular(rows: Sequence[Row], answers: Sequence[str], rule: ChoiceRule) -> UnitScores:
    """Circular accuracy: a question is right if it is right in every order of its options."""
    right, unreadable = _read(rows, answers, rule)
    all_right: dict[str, bool] = {}
    category: dict[str, str] = {}
    for row, is_right in zip(rows, right, strict=True):
        all_right[row.unit] = all_right.get(row.unit, True) and is_right
        category.setdefault(row.unit, row.category)
    units = list(all_right)
    tally = accuracy_scores(
        [float(all_right[unit]) for unit in units], units, [category[unit] for unit in units]
    )
    rows_right = int(np.sum(right))
    counts = {
        "right": rows_right,
        "wrong": len(rows) - rows_right - len(unreadable),
        "unreadable": len(unreadable),
        "questions": len(units),
    }
    option_counts: dict[str, list[int]] = {}
    for row in rows:
        option_counts.setdefault(row.unit, []).append(len(row.options))
    chance = circular_chance(option_counts)
    return replace(
        tally,
        counts=counts,
        unreadable=tuple(unreadable),
        chance={} if chance is None else {"accuracy": chance},
    )
