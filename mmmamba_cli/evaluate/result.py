"""Results of an evaluation as typed, reproducible JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.errors import RunError
from mmmamba_cli.evaluate.bootstrap import CONFIDENCE_LEVEL, NUM_RESAMPLES, intervals
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores

# The folder of a run that results are written to, and the files of one model and suite.
EVALS = "evals"
RESULT, RETENTION, TIMING = "result.json", "retention.json", "timing.json"
PREDICTIONS = "predictions.tsv"
SHOWN_ANSWERS = 5
# The setting `answers` of a result.
GENERATED, CHOSEN_BY_LIKELIHOOD = "generated", "chosen by likelihood"
CHOSEN_AMONG_ANSWERS = f"{CHOSEN_BY_LIKELIHOOD} among answers to other questions"
DEFAULT_SEED = 0

# Results written before versions of a rule had dates name the scoring function without one.
UNDATED_SCORING = {"choice_rows": "2025-08", "choice_circular": "2025-08", "vqa_words": "2024-01"}

Interval = tuple[float, float]


class JsonModel(BaseModel):
    """Base of results: frozen, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInfo(JsonModel):
    """The evaluated model; for a predictions file, the file's name and hash."""

    name: str
    content_hash: str
    kind: str = ""
    final: bool | None = None


class DataInfo(JsonModel):
    """The questions that were asked.

    `sha256` is that of the table. The table has `rows` rows of the suite, of which `used` were
    asked, `without_image` of them without a picture. `asked` is a digest of the indexes of the rows
    asked, None for all rows. `pictures` is a digest of the picture files of these rows, None if all
    pictures are in the table or if it is unknown. `categories_not_asked` lists the table's
    categories without a row asked.
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
        """Whether only some rows of the suite were asked."""
        return self.used < self.rows

    def same_questions(self, other: DataInfo) -> bool:
        """Whether both have the same rows and, as far as known, the same pictures."""
        pictures = {one.pictures for one in (self, other)} - {None}
        compared = {"file", "sha256", "used", "without_image", "asked"}
        mine, theirs = self.model_dump(include=compared), other.model_dump(include=compared)
        return mine == theirs and len(pictures) < 2


class UnreadableAnswer(JsonModel):
    """An answer that a rule could not parse."""

    index: str
    answer: str


class SkippedRow(JsonModel):
    """A row that could not be asked, for example because of a damaged picture."""

    index: str
    reason: str


class RuleResult(JsonModel):
    """Scores of a suite by one rule. `metric` names the headline metric in `metrics`."""

    rule: str
    scoring: str
    metric: str
    # None, without an interval, if no row that the metric covers was asked.
    metrics: dict[str, float | None]
    intervals: dict[str, Interval]
    counts: dict[str, int]
    categories: dict[str, dict[str, int | float]]
    unreadable: tuple[UnreadableAnswer, ...] = ()
    notes: tuple[str, ...] = ()
    # Expected scores of random guesses, by metric, where they are known.
    chance: dict[str, float] = {}

    @property
    def headline(self) -> float | None:
        """The value of the headline metric."""
        return self.metrics[self.metric]

    @model_validator(mode="before")
    @classmethod
    def _add_date(cls, value: Any) -> Any:
        """Add the version of the rule to a result that was written without it."""
        date = UNDATED_SCORING.get(str(value.get("scoring"))) if isinstance(value, dict) else None
        if date is None:
            return value
        dated = {**value, "scoring": f"{value['scoring']}_{date.replace('-', '_')}"}
        if str(value.get("rule")).startswith("vlmevalkit"):
            dated["rule"] = f"{value['rule']}-{date}"
        return dated


class Result(JsonModel):
    """The contents of `result.json`: no times, so that equal runs give equal files."""

    format: int = 1
    suite: str
    title: str
    version: int
    suite_digest: str
    data: DataInfo
    model: ModelInfo
    # Everything beside model and data that can change an answer.
    settings: dict[str, Any]
    rules: tuple[RuleResult, ...]
    # Rows that could not be asked; their answers are empty and count as wrong.
    not_asked: tuple[SkippedRow, ...] = ()
    seed: int
    draws: int = NUM_RESAMPLES
    level: float = CONFIDENCE_LEVEL
    versions: dict[str, str]

    def rule(self, name: str) -> RuleResult | None:
        return next((part for part in self.rules if part.rule == name), None)


def rule_result(
    name: str, scoring: str, scores: UnitScores, answers: dict[str, str], seed: int
) -> RuleResult:
    """Scores as they are written, with the confidence intervals of their metrics."""
    metrics = scores.values()
    shown = scores.unreadable[:SHOWN_ANSWERS]
    return RuleResult(
        rule=name,
        scoring=scoring,
        metric=scores.headline,
        metrics=metrics,
        intervals=intervals(scores, seed=seed),
        counts=dict(scores.counts),
        categories={key: dict(value) for key, value in scores.categories.items()},
        unreadable=tuple(UnreadableAnswer(index=i, answer=answers[i]) for i in shown),
        notes=scores.notes,
        chance=dict(scores.chance),
    )


@dataclass
class ScoredSuite:
    """The result of one model on one suite, and the unit scores that retention is computed from."""

    result: Result
    unit_scores: dict[str, UnitScores]
    rows: Sequence[Row] = field(default_factory=list)


def json_text(parts: BaseModel | Sequence[BaseModel]) -> str:
    """The JSON text that is written to disk."""
    value = (
        parts.model_dump(mode="json")
        if isinstance(parts, BaseModel)
        else [part.model_dump(mode="json") for part in parts]
    )
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_result(folder: Path, scored: ScoredSuite, answers: Mapping[str, str]) -> None:
    """Write `result.json`, and `predictions.tsv` in VLMEvalKit's columns for other scorers.

    A `retention.json` of another result is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, result = folder / RESULT, json_text(scored.result)
    if not file.is_file() or file.read_text(encoding="utf-8-sig") != result:
        (folder / RETENTION).unlink(missing_ok=True)
    atomic_write_text(file, result)
    text = io.StringIO()
    # The writer of Python 3.11 does not quote a carriage return, which readers take for an end.
    has_returns = any("\r" in cell for cell in answers.values())
    make = partial(csv.writer, text, delimiter="\t", lineterminator="\n")
    writer = make(quoting=csv.QUOTE_ALL) if has_returns else make()
    writer.writerow(["index", "question", "answer", "category", "prediction"])
    for row in scored.rows:
        writer.writerow([row.index, row.question, row.answer, row.category, answers[row.index]])
    atomic_write_text(folder / PREDICTIONS, text.getvalue())


def read_result(file: Path) -> Result:
    """Read a `result.json`.

    Raises `RunError` if the file does not exist, is damaged, or was written for another kit.
    """
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
    """The kit whose scores a `result.json` has; None for mmmamba's own and for damaged text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kit = value.get("kit") if isinstance(value, dict) else None
    return kit if isinstance(kit, str) else None
