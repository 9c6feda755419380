"""Rows of a suite: questions, right answers, and the units they belong to."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase

from mmmamba_cli.errors import DataError, name_some
from mmmamba_cli.evaluate.suite import Suite

# Index offset in MMBench's TSVs between circular turns (the same question, options rotated).
CIRCULAR_STEP = 1_000_000


@dataclass(frozen=True)
class Row:
    """One question. `unit` names the rows that are scored or resampled together (`Suite.unit`)."""

    index: str
    question: str
    answer: str
    category: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""
    unit: str = ""
    # Position of the row in its table.
    place: int = 0


def read_rows(cells: Sequence[Mapping[str, str]], suite: Suite, where: str) -> list[Row]:
    """The rows of a table that match `suite.only`, in table order; columns must be checked before.

    Rows with equal cells `picture`, a column that the table adds, show the same picture. Raises
    `DataError` that names the rows for incomplete MME pairs, answers other than yes and no in a
    yes/no suite, and non-numeric indexes of circular turns.
    """
    rows = [
        _row(cell, suite, place, where)
        for place, cell in enumerate(cells)
        if belongs_to_suite(cell, suite)
    ]
    if not rows:
        wanted = ", ".join(f"{column} {value}" for column, value in suite.only.items())
        raise DataError(f"{where} has no rows" + (f" with {wanted}" if wanted else ""))
    if suite.choices == ("Yes", "No"):
        _check_yes_no(rows, where)
    if suite.unit == "pair":
        _check_pairs(rows, where)
    return rows


def belongs_to_suite(cell: Mapping[str, str], suite: Suite) -> bool:
    """Whether a row of a table belongs to the suite by `Suite.only`."""
    return all(cell.get(column, wanted) == wanted for column, wanted in suite.only.items())


def _row(cell: Mapping[str, str], suite: Suite, place: int, where: str) -> Row:
    index, category = cell["index"], cell.get("category", "")
    options = {letter: cell[letter] for letter in ascii_uppercase if cell.get(letter)}
    return Row(
        index=index,
        question=cell["question"],
        answer=cell.get("answer", ""),
        category=category,
        options=options,
        hint=cell.get("hint", ""),
        unit=_unit(cell, suite, index, category, where),
        place=place,
    )


def _unit(cell: Mapping[str, str], suite: Suite, index: str, category: str, where: str) -> str:
    picture = cell.get("image_path") or cell.get("picture", "")
    if suite.unit == "row":
        return index
    if suite.unit == "turns":
        if not (index.isascii() and index.isdigit()):
            raise DataError(
                f"{where}: index {index} is no number, which the turns of a question are told by"
            )
        return cell.get("g_index") or str(int(index) % CIRCULAR_STEP)
    return f"{category}: {picture}" if suite.unit == "pair" else picture or index


def _check_yes_no(rows: Sequence[Row], where: str) -> None:
    wrong = [row.index for row in rows if row.answer.lower() not in ("yes", "no")]
    if wrong:
        raise DataError(
            f"{where}: the right answer is neither Yes nor No in the rows of index "
            f"{name_some(wrong)}",
            "expected a column answer with Yes or No",
        )


def _check_pairs(rows: Sequence[Row], where: str) -> None:
    pairs: dict[str, list[str]] = {}
    for row in rows:
        pairs.setdefault(row.unit, []).append(row.index)
    odd = [indexes for indexes in pairs.values() if len(indexes) != 2]
    if odd:
        listed = name_some((f"{'+'.join(indexes)} ({len(indexes)})" for indexes in odd), 5)
        raise DataError(
            f"{where}: every picture must have two questions in its category, not so the rows of "
            f"index {listed}",
            "pairs are told by the columns category and image_path, or by a shared picture",
        )


# Units that are scored as a whole; the other units only matter for confidence intervals.
WHOLE_UNITS = ("pair", "turns")


def limit_rows(rows: Sequence[Row], suite: Suite, limit: int | None) -> list[Row]:
    """At most `limit` rows, spread evenly over the categories, in table order.

    Categories take turns (round robin). Pairs and circular turns are kept whole; at least one is
    taken.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    whole = suite.unit in WHOLE_UNITS
    units: dict[str, list[Row]] = {}
    for row in rows:
        units.setdefault(row.unit if whole else row.index, []).append(row)
    waiting: dict[str, deque[list[Row]]] = {}
    for unit in units.values():
        waiting.setdefault(unit[0].category, deque()).append(unit)
    taken: set[str] = set()
    while waiting:
        for category in list(waiting):
            unit = waiting[category].popleft()
            if taken and len(taken) + len(unit) > limit:
                return [row for row in rows if row.index in taken]
            taken.update(row.index for row in unit)
            if not waiting[category]:
                del waiting[category]
    return [row for row in rows if row.index in taken]
