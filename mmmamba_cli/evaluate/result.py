"""A result as it is written: typed, and the same bytes whenever the same was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mmmamba_cli.errors import RunError
from mmmamba_cli.evaluate.bootstrap import DRAWS, LEVEL, intervals, ratio_interval
from mmmamba_cli.evaluate.scoring.tally import Tally

RESULT, RETENTION, TIMING = "result.json", "retention.json", "timing.json"
SHOWN_ANSWERS = 5

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
    """Which table was asked: `rows` are in it, `used` were asked, `without_image` are among them"""

    file: str
    sha256: str
    rows: int
    used: int
    without_image: int = 0


class Unreadable(_Part):
    """An answer that a rule could not make sense of."""

    index: str
    answer: str


class RulePart(_Part):
    """A suite by one rule. `metric` names the headline, which is also in `metrics`."""

    rule: str
    scoring: str
    metric: str
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    counts: dict[str, int]
    categories: dict[str, dict[str, int | float]]
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = ()


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
    seed: int
    draws: int = DRAWS
    level: float = LEVEL
    versions: dict[str, str]

    def rule(self, name: str) -> RulePart | None:
        return next((part for part in self.rules if part.rule == name), None)


class Retention(_Part):
    """How much of the teacher's score a student has, by one rule; None where the teacher has 0."""

    suite: str
    rule: str
    metric: str
    student: str
    teacher: str
    student_value: float
    teacher_value: float
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
        metric=next(iter(metrics)),
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
    ours, theirs = student[1].values(), teacher[1].values()
    metric = next(iter(ours))
    known = theirs[metric] != 0
    return Retention(
        suite=suite,
        rule=rule,
        metric=metric,
        student=student[0],
        teacher=teacher[0],
        student_value=ours[metric],
        teacher_value=theirs[metric],
        ratio=ours[metric] / theirs[metric] if known else None,
        interval=ratio_interval(student[1], teacher[1], metric, seed=seed) if known else None,
        rows=rows,
        seed=seed,
    )


def json_text(parts: BaseModel | Sequence[BaseModel]) -> str:
    """As written to disk."""
    import json

    value = (
        parts.model_dump(mode="json")
        if isinstance(parts, BaseModel)
        else [part.model_dump(mode="json") for part in parts]
    )
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_result(file: Path) -> Result:
    """Raises `RunError` if the file is not there or no result."""
    try:
        return Result.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{file} is not there", "run mmmamba eval first") from error
    except ValueError as error:
        raise RunError(f"{file} is no result of mmmamba eval", "run it again") from error
