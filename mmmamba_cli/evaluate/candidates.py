"""Candidate answers of a row, which a model ranks by likelihood."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.evaluate.vlmeval_table import split_cell

# Wrong answers that an open answer is ranked against.
WRONG_ANSWERS = 3


@dataclass(frozen=True)
class Candidates:
    """The answers to rank, and the right one.

    `open`: they are answers to an open question, of unequal length, so that likelihoods are
    compared per byte of text.
    """

    texts: tuple[str, ...]
    right: str
    open: bool = False


def find_candidates(rows: Sequence[Row], suite: Suite) -> list[Candidates]:
    """The candidates of each row: the letters of its options, the suite's choices, or open answers.

    The right answer to an open question is the most frequent of its annotators. It is ranked
    against three answers to other questions of its category, drawn by a hash of suite and row, so
    that another order of the rows draws the same ones. If the category has fewer, answers of other
    categories fill up.
    """
    pools: dict[str, list[str]] = {}
    for row in rows:
        if not _choices(row, suite):
            pools.setdefault(row.category, []).append(reference_answer(row))
    everything = sorted({answer for pool in pools.values() for answer in pool})
    unique = {category: sorted(set(pool)) for category, pool in pools.items()}
    found = []
    for row in rows:
        choices = _choices(row, suite)
        if choices:
            right = next((one for one in choices if one.lower() == row.answer.lower()), row.answer)
            found.append(Candidates(choices, right))
        else:
            found.append(_open_candidates(row, suite, (unique[row.category], everything)))
    return found


def _choices(row: Row, suite: Suite) -> tuple[str, ...]:
    return tuple(row.options) or suite.choices


def reference_answer(row: Row) -> str:
    """The right answer to an open question; the first of the most frequent ones in a list."""
    answers = split_cell(row.answer)
    return Counter(answers).most_common(1)[0][0] if answers else row.answer


def _open_candidates(row: Row, suite: Suite, pools: Sequence[Sequence[str]]) -> Candidates:
    right = reference_answer(row)
    accepted = {answer.strip().lower() for answer in (*split_cell(row.answer), right)}
    wrong: list[str] = []
    for pool in pools:
        others = [one for one in pool if one.strip().lower() not in {*accepted, *_lower(wrong)}]
        wrong += _draw(others, WRONG_ANSWERS - len(wrong), f"{suite.name}/{row.index}")
    ordered = sorted((right, *wrong), key=lambda one: _digest(f"{suite.name}/{row.index}/{one}"))
    return Candidates(tuple(ordered), right, open=True)


def _lower(texts: Sequence[str]) -> set[str]:
    return {text.strip().lower() for text in texts}


def _draw(texts: Sequence[str], count: int, seed: str) -> list[str]:
    """`count` different texts, or all if there are fewer; none equals another in lower case."""
    left = list({text.strip().lower(): text for text in texts}.values())
    drawn: list[str] = []
    while left and len(drawn) < count:
        drawn.append(left.pop(_digest(f"{seed}/{len(drawn)}") % len(left)))
    return drawn


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
