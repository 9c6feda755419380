"""Questions and answers of a suite in few bytes, from which every score can be computed again.

A cell's JSON has one character for each answer. What the questions were (units, categories, right
answers) is the same for all cells and stands once, in a file that is named by its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.errors import RunError
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring import UnitScores, find_rule
from mmmamba_cli.runs.manifest import read_json_as

QUESTIONS = "questions"
DIGEST_DIGITS = 16
# One character for each of the first distinct answers; a cell with more has a list of numbers.
CODES = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class _JsonModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Texts(_JsonModel):
    """A list of texts with few distinct ones: `distinct`, and the place of each in it."""

    distinct: tuple[str, ...]
    places: str | tuple[int, ...]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        distinct = tuple(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        places = [place[text] for text in texts]
        if len(distinct) <= len(CODES):
            return cls(distinct=distinct, places="".join(CODES[i] for i in places))
        return cls(distinct=distinct, places=tuple(places))

    def texts(self) -> list[str]:
        places = self.places
        if isinstance(places, str):
            return [self.distinct[CODES.index(letter)] for letter in places]
        return [self.distinct[i] for i in places]


class Questions(_JsonModel):
    """The rows of a suite without their texts and pictures.

    Units are numbered in order of appearance.
    """

    format: int = 1
    suite: str
    indexes: tuple[str, ...]
    units: Texts
    categories: Texts
    answers: Texts
    options: tuple[dict[str, str], ...] = ()

    @classmethod
    def of(cls, suite: str, rows: Sequence[Row]) -> Questions:
        place = {unit: str(i) for i, unit in enumerate(dict.fromkeys(row.unit for row in rows))}
        return cls(
            suite=suite,
            indexes=tuple(row.index for row in rows),
            # Units are pictures, whose names or bytes are of no use here.
            units=Texts.of([place[row.unit] for row in rows]),
            categories=Texts.of([row.category for row in rows]),
            answers=Texts.of([row.answer for row in rows]),
            options=tuple(dict(row.options) for row in rows)
            if any(row.options for row in rows)
            else (),
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()[:DIGEST_DIGITS]

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False) + "\n"

    def rows(self) -> list[Row]:
        """The rows as scoring rules need them, without questions."""
        options: Sequence[dict[str, str]] = self.options or [{}] * len(self.indexes)
        parts = zip(
            self.indexes,
            self.units.texts(),
            self.categories.texts(),
            self.answers.texts(),
            options,
            strict=True,
        )
        return [
            Row(
                index=index,
                question="",
                answer=answer,
                category=category,
                options=listed,
                unit=unit,
                place=place,
            )
            for place, (index, unit, category, answer, listed) in enumerate(parts)
        ]

    def scores(self, scoring: str, answers: Texts) -> UnitScores:
        """The scores of a cell's answers by a scoring function."""
        return find_rule(scoring)(self.rows(), answers.texts())

    def correct(self, scoring: str, answers: Texts) -> str:
        """For each question 1 if its answer is right, else 0; by the rule for it alone."""
        rule, known = find_rule(scoring), dict[Any, str]()
        found = []
        for row, text in zip(self.rows(), answers.texts(), strict=True):
            key = (row.answer, row.category, tuple(row.options.items()), text)
            if key not in known:
                known[key] = str(rule([row], [text]).counts["right"])
            found.append(known[key])
        return "".join(found)


def write_questions(folder: Path, questions: Questions) -> str:
    """Write the questions of a suite below `folder` unless they are there; return their digest."""
    digest = questions.digest
    file = folder / QUESTIONS / f"{questions.suite}-{digest}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, questions.text())
    return digest


def read_questions(folder: Path, suite: str, digest: str) -> Questions:
    """Read the questions of a suite. Raises `RunError` if they are missing or were changed."""
    file = folder / QUESTIONS / f"{suite}-{digest}.json"
    questions = read_json_as(file, Questions)
    if questions.digest != digest:
        raise RunError(
            f"{file} was changed since it was written: its digest is {questions.digest}",
            "restore it, or remove it with the results that name it and run the plan again",
        )
    return questions
