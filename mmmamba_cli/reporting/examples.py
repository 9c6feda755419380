"""Example questions with their images and each model's answers: the first ones, not the best."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.evaluate import EvalOptions, find_suite
from mmmamba_cli.evaluate.evaluator import open_suite
from mmmamba_cli.evaluate.images import pictures_of
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.yes_no import read_words
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.evaluate.vlmeval_table import VLMEvalTable
from mmmamba_cli.reporting.run_contents import ModelResult

# Pixels of the longer side of an image, and questions per image.
MAX_IMAGE_SIDE, MAX_QUESTIONS = 336, 4
JPEG_QUALITY = 80


@dataclass(frozen=True)
class ModelAnswer:
    """One model's answer; `right` is None if no rule can decide it."""

    label: str
    text: str
    right: bool | None


@dataclass(frozen=True)
class QuestionAnswers:
    """A question, the right answer, and each model's answer."""

    question: str
    answer: str
    answers: tuple[ModelAnswer, ...]


@dataclass(frozen=True)
class Example:
    """An image as a data URI, None if there is none, and questions about it."""

    category: str
    number: str
    picture: str | None
    questions: tuple[QuestionAnswers, ...]
    left_out: int


def find_examples(
    suite: Suite,
    table: VLMEvalTable,
    rows: Sequence[Row],
    results: Sequence[ModelResult],
    *,
    categories: int | None = None,
    questions: int = MAX_QUESTIONS,
) -> list[Example]:
    """The first image of each category about which every model was asked.

    `categories` takes that many, evenly spaced in the order of the table; `questions` is the
    largest number about one image.
    """
    units: dict[str, list[Row]] = {}
    for row in rows:
        if all(row.index in one.answers for one in results):
            units.setdefault(row.unit, []).append(row)
    first: dict[str, list[Row]] = {}
    for unit in units.values():
        first.setdefault(unit[0].category, unit)
    listed = list(first.values())
    if categories is not None and categories < len(listed):
        listed = [listed[i * len(listed) // categories] for i in range(categories)]
    return [_example(suite, table, unit, results, questions) for unit in listed]


def open_table(
    results: Sequence[ModelResult], data: Path | None
) -> tuple[Suite, VLMEvalTable, list[Row]]:
    """Open the table of a suite's results, and select the rows that all of them answer.

    Raises:
        DataError: if the table is not found, or is not the one the results are from.
    """
    result = results[0].result
    suite = find_suite(result.suite)
    table, rows = open_suite(suite, EvalOptions(data=data), _refuse_to_build)
    if table.sha256 != result.data.sha256:
        raise DataError(
            f"{table.file} is not the table that {result.suite} was asked from",
            "name its folder with --data",
        )
    if result.data.partial:
        # The rows that --limit selects depend on the version that ran the evaluation.
        rows = [row for row in rows if all(row.index in one.answers for one in results)]
    return suite, table, rows


def _refuse_to_build(text: str) -> NoReturn:
    # Answers to the suite's built table would have left that table in the cache.
    raise DataError("the table of questions is not there", "name its folder with --data")


def judge(suite: Suite) -> Callable[[str, str], bool | None]:
    """A function (right answer, answer) -> right or not, for yes/no suites; None for others."""
    if suite.choices != ("Yes", "No"):
        return lambda expected, answer: None
    return lambda expected, answer: read_words(answer) == expected.lower()


def _example(
    suite: Suite,
    table: VLMEvalTable,
    rows: Sequence[Row],
    results: Sequence[ModelResult],
    most: int,
) -> Example:
    is_right = judge(suite)
    questions = []
    for row in rows[:most]:
        answers = []
        for one in results:
            text = one.answers[row.index]["prediction"]
            answers.append(ModelAnswer(one.label, text, is_right(row.answer, text)))
        questions.append(QuestionAnswers(row.question, row.answer, tuple(answers)))
    return Example(
        rows[0].category,
        rows[0].index,
        _picture(suite, table, rows[0]),
        tuple(questions),
        len(rows) - len(questions),
    )


def _picture(suite: Suite, table: VLMEvalTable, row: Row) -> str | None:
    """The first image of a row, re-encoded so that no metadata of the file gets into the page."""
    try:
        pictures = pictures_of(table, table.cells[row.place], suite.dataset, suite.enlarge)
        if not pictures:
            return None
        image = pictures[0].open()
    except MmmambaError:
        return None
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
