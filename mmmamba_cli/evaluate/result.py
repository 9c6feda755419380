"""A result as it is written: typed, and the same bytes whenever the same was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from mmmamba_cli.errors import RunError
from mmmamba_cli.evaluate.bootstrap import DRAWS, LEVEL, intervals, ratio_interval
from mmmamba_cli.evaluate.scoring.metrics import Tally

RESULT, RETENTION, TIMING = "result.json", "retention.json", "timing.json"
SHOWN_ANSWERS = 5

# Results written before versions of a rule had dates name the scoring function without one.
UNDATED_SCORING = {"choice_rows": "2025-08", "choice_circular": "2025-08", "vqa_words": "2024-01"}

Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPart(_Part):
    """Which model answered; of a predictions file, the file's name and hash."""

    name: str
    content_hash: str
    kind: str = ""
    final: bool | None = None


class DataPart(_Part):
    """Which questions were asked.

    `sha256` is of the table, `rows` of the suite are in it, `used` were asked, and `without_image`
    are among them. `asked` is a digest of the indexes of the rows asked, None for all rows.
    `pictures` is a digest of the picture files that these rows name, None where all pictures are in
    the table, or it is not known. `categories_not_asked` are those of the table of which no row was
    asked.
    """

    file: str
    sha256: str
    rows: int
    used: int
    without_image: int = 0
    asked: str | None = None
    pictures: str | None = None
    categories_not_asked: tuple[str, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether not all rows of the suite were asked."""
        return self.used < self.rows

    def same_questions(self, other: DataPart) -> bool:
        """Whether both were asked the same rows with the same pictures, as far as it is known."""
        pictures = {one.pictures for one in (self, other)} - {None}
        compared = {"file", "sha256", "used", "without_image", "asked"}
        mine, theirs = self.model_dump(include=compared), other.model_dump(include=compared)
        return mine == theirs and len(pictures) < 2


class Unreadable(_Part):
    """An answer that a rule could not make sense of."""

    index: str
    answer: str


class NotAsked(_Part):
    """A row that the model could not be asked, such as one with a damaged picture."""

    index: str
    reason: str


class RulePart(_Part):
    """A suite by one rule. `metric` names the headline, which is also in `metrics`."""

    rule: str
    scoring: str
    metric: str
    # None where nothing was asked that the metric is about; it then has no interval.
    metrics: dict[str, float | None]
    intervals: dict[str, Interval]
    counts: dict[str, int]
    categories: dict[str, dict[str, int | float]]
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _add_date(cls, value: Any) -> Any:
        """Name the version of a rule in a result that was written without it."""
        date = UNDATED_SCORING.get(str(value.get("scoring"))) if isinstance(value, dict) else None
        if date is None:
            return value
        dated = {**value, "scoring": f"{value['scoring']}_{date.replace('-', '_')}"}
        if str(value.get("rule")).startswith("vlmevalkit"):
            dated["rule"] = f"{value['rule']}-{date}"
        return dated


class Result(_Part):
    """The contents of `result.json`: no times, so that the same run gives the same file."""

    format: int = 1
    suite: str
    title: str
    version: int
    suite_digest: str
    data: DataPart
    model: ModelPart
    # Everything beside the model and the data that can change an answer.
    settings: dict[str, Any]
    rules: tuple[RulePart, ...]
    # Every row that could not be asked; its answer is empty and counts as wrong.
    not_asked: tuple[NotAsked, ...] = ()
    seed: int
    draws: int = DRAWS
    level: float = LEVEL
    versions: dict[str, str]

    def rule(self, name: str) -> RulePart | None:
        return next((part for part in self.rules if part.rule == name), None)


class Retention(_Part):
    """How much of the teacher's score a student has, by one rule.

    `ratio` is None where the teacher has 0, or nothing was asked that the metric is about.
    """

    suite: str
    rule: str
    metric: str
    student: str
    teacher: str
    student_value: float | None
    teacher_value: float | None
    ratio: float | None
    interval: Interval | None
    rows: int
    seed: int


def rule_part(
    name: str, scoring: str, tally: Tally, answers: dict[str, str], seed: int
) -> RulePart:
    """A tally as it is written, with the intervals of its metrics."""
    metrics = tally.values()
    shown = tally.unreadable[:SHOWN_ANSWERS]
    return RulePart(
        rule=name,
        scoring=scoring,
        metric=tally.headline,
        metrics=metrics,
        intervals=intervals(tally, seed=seed),
        counts=dict(tally.counts),
        categories={key: dict(value) for key, value in tally.categories.items()},
        unreadable=tuple(Unreadable(index=i, answer=answers[i]) for i in shown),
        notes=tally.notes,
    )


def retention(
    suite: str,
    rule: str,
    student: tuple[str, Tally],
    teacher: tuple[str, Tally],
    rows: int,
    seed: int,
) -> Retention:
    """Student over teacher by a rule's headline, both answering the same rows."""
    metric = teacher[1].headline
    ours, theirs = student[1].values()[metric], teacher[1].values()[metric]
    ratio = ours / theirs if ours is not None and theirs else None
    return Retention(
        suite=suite,
        rule=rule,
        metric=metric,
        student=student[0],
        teacher=teacher[0],
        student_value=ours,
        teacher_value=theirs,
        ratio=ratio,
        interval=None
        if ratio is None
        else ratio_interval(student[1], teacher[1], metric, seed=seed),
        rows=rows,
        seed=seed,
    )


def json_text(parts: BaseModel | Sequence[BaseModel]) -> str:
    """As written to disk."""
    value = (
        parts.model_dump(mode="json")
        if isinstance(parts, BaseModel)
        else [part.model_dump(mode="json") for part in parts]
    )
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_result(file: Path) -> Result:
    """Raises `RunError` if the file is not there, is no result, or is one of another kit."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RunError(f"{file} is not there", "run mmmamba eval first") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{file} is no result of mmmamba eval", "run it again") from error
    kit = _kit_of(text)
    if kit is not None:
        raise RunError(
            f"{file} has the scores of {kit}, which are not those of a suite of mmmamba",
            "read it as it is: scores by task",
        )
    try:
        return Result.model_validate_json(text)
    except ValueError as error:
        raise RunError(f"{file} is no result of mmmamba eval", "run it again") from error


def _kit_of(text: str) -> str | None:
    """The kit that wrote a `result.json`; None for mmmamba, and for what cannot be read."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kit = value.get("kit") if isinstance(value, dict) else None
    return kit if isinstance(kit, str) else None


@dataclass(frozen=True)
class FoundResults:
    """The results below a folder, by file; `left_out` has a sentence for each that is not used."""

    results: dict[Path, Result]
    left_out: tuple[str, ...]


def find_results(folder: Path) -> FoundResults:
    """Every `result.json` below `folder`, in the order of their paths.

    Results of other kits, which have the same file name, and damaged files are left out by name.
    """
    results: dict[Path, Result] = {}
    left_out = []
    for file in sorted(folder.rglob(RESULT)):
        try:
            results[file] = read_result(file)
        except RunError as error:
            left_out.append(error.message)
    return FoundResults(results, tuple(left_out))
