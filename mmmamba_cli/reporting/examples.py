"""Questions with their pictures and what each model said: the first ones, not the best ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.evaluate import Options, find_suite
from mmmamba_cli.evaluate.evaluator import open_suite
from mmmamba_cli.evaluate.images import pictures_of
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.yes_no import read_words
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.evaluate.vlmeval_table import Table
from mmmamba_cli.reporting.run_contents import Evaluated

# Pixels of the longer side of a shown picture, and questions shown about one.
SIDE, QUESTIONS = 336, 4
JPEG = 80


@dataclass(frozen=True)
class Said:
    """One model's answer; `right` is None where no rule of ours can tell."""

    label: str
    text: str
    right: bool | None


@dataclass(frozen=True)
class Asked:
    """A question, the right answer, and what was said."""

    question: str
    answer: str
    said: tuple[Said, ...]


@dataclass(frozen=True)
class Example:
    """A picture, as a data URI, None where there is none, and questions about it."""

    category: str
    number: str
    picture: str | None
    asked: tuple[Asked, ...]
    left_out: int


def find_examples(
    suite: Suite, table: Table, rows: Sequence[Row], results: Sequence[Evaluated]
) -> list[Example]:
    """The first picture of each category that every model was asked about."""
    units: dict[str, list[Row]] = {}
    for row in rows:
        if all(row.index in one.answers for one in results):
            units.setdefault(row.unit, []).append(row)
    first: dict[str, list[Row]] = {}
    for unit in units.values():
        first.setdefault(unit[0].category, unit)
    return [_example(suite, table, unit, results) for unit in first.values()]


def open_table(results: Sequence[Evaluated], data: Path | None) -> tuple[Suite, Table, list[Row]]:
    """The table that results of one suite were asked from, and its rows that all of them answer.

    Raises `DataError` if it cannot be had, or is another one.
    """
    result = results[0].result
    suite = find_suite(result.suite)
    table, rows = open_suite(suite, Options(data=data), _refuse_to_build)
    if table.sha256 != result.data.sha256:
        raise DataError(
            f"{table.file} is not the table that {result.suite} was asked from",
            "name its folder with --data",
        )
    if result.data.partial:
        # Which rows a limit took depends on the version that asked.
        rows = [row for row in rows if all(row.index in one.answers for one in results)]
    return suite, table, rows


def _refuse_to_build(text: str) -> NoReturn:
    # Had the answers been to the suite's own table, it would be in the cache.
    raise DataError("the table of questions is not there", "name its folder with --data")


def judge(suite: Suite) -> Callable[[str, str], bool | None]:
    """Whether an answer is right, by (right answer, answer): of questions of yes and no."""
    if suite.choices != ("Yes", "No"):
        return lambda answer, said: None
    return lambda answer, said: read_words(said) == answer.lower()


def _example(
    suite: Suite, table: Table, rows: Sequence[Row], results: Sequence[Evaluated]
) -> Example:
    is_right = judge(suite)
    asked = []
    for row in rows[:QUESTIONS]:
        said = []
        for one in results:
            text = one.answers[row.index]["prediction"]
            said.append(Said(one.label, text, is_right(row.answer, text)))
        asked.append(Asked(row.question, row.answer, tuple(said)))
    return Example(
        rows[0].category,
        rows[0].index,
        _picture(suite, table, rows[0]),
        tuple(asked),
        len(rows) - len(asked),
    )


def _picture(suite: Suite, table: Table, row: Row) -> str | None:
    """The first picture of a row, drawn anew: nothing of the file gets into the page."""
    try:
        pictures = pictures_of(table, table.cells[row.place], suite.dataset, suite.enlarge)
        if not pictures:
            return None
        image = pictures[0].open()
    except MmmambaError:
        return None
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
