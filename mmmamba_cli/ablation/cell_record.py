"""The record of a cell as JSON: its recipe, machine, models, scores and times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mmmamba_cli.ablation.answers import Texts
from mmmamba_cli.ablation.cells import Cell
from mmmamba_cli.ablation.plan import SuiteUse
from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.errors import RunError
from mmmamba_cli.runs.manifest import read_json_as

FORMAT = 1
# Characters of a failure in a line of output; its whole message is in the record.
MAX_SENTENCE = 160
RESULTS = Path("benchmarks/results/evidence")


class _JsonModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecord(_JsonModel):
    """The evaluated model; `parent` is the product that the cell's own training started from."""

    product: str
    kind: str
    content_hash: str
    parameters: int | None = None
    parent: tuple[str, str] | None = None
    attention_layers: tuple[int, ...] = ()
    data: dict[str, dict[str, str]] = {}


class StageRecord(_JsonModel):
    """A stage as it was trained; `held_out` has the metrics of each evaluation, by step."""

    name: str
    product: str
    steps: int
    tokens: int
    samples: int
    loss: float | None
    # The median over steps, and the largest.
    tokens_per_second: float | None = None
    memory_gib: float | None = None
    held_out: tuple[dict[str, Any], ...] = ()


class RuleRecord(_JsonModel):
    """Scores by one rule, with the 95 % intervals of one cell alone."""

    rule: str
    scoring: str
    metric: str
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]


class LaterAnswers(_JsonModel):
    """Where and when a suite was answered that the plan gained after the cell was finished."""

    date: str
    device: str
    versions: dict[str, str]
    seconds: float


class SuiteRecord(_JsonModel):
    """A cell's answers to a suite; `correct` has a 1 for each right one by the first rule.

    `later` is None if they were given when the cell was finished, on its device.
    """

    label: str
    suite: str
    version: int
    suite_digest: str
    data_sha256: str
    asked: int
    not_asked: int
    questions: str
    answers: Texts
    correct: str
    settings: dict[str, Any]
    rules: tuple[RuleRecord, ...]
    later: LaterAnswers | None = None

    def rule(self, name: str | None) -> RuleRecord | None:
        """The rule of that name, or the first one."""
        if name is None:
            return self.rules[0] if self.rules else None
        return next((rule for rule in self.rules if rule.rule == name), None)


class Timing(_JsonModel):
    """What differs between equal runs."""

    date: str
    # Seconds of everything but steps and suites, in the call that finished the cell.
    other: float = 0.0
    stages: dict[str, float] = {}
    # Without suites that an earlier call had begun to answer.
    suites: dict[str, float] = {}
    # Cells that ran at the same time, this one included.
    jobs: int = 1


class CellRecord(_JsonModel):
    """The contents of a cell's JSON. `error` is the message of a cell that failed."""

    format: int = FORMAT
    plan: str
    cell: str
    arm: str
    seed: int | None
    digest: str
    status: Literal["finished", "failed"]
    error: str | None = None
    commands: tuple[str, ...] = ()
    recipe: str | None = None
    recipe_sha256: str | None = None
    model: ModelRecord | None = None
    stages: tuple[StageRecord, ...] = ()
    suites: tuple[SuiteRecord, ...] = ()
    device: str = ""
    versions: dict[str, str] = {}
    timing: Timing

    def suite(self, label: str) -> SuiteRecord | None:
        return next((suite for suite in self.suites if suite.label == label), None)


def first_sentence(message: str) -> str:
    """The first sentence of a failure's message, cut at `MAX_SENTENCE` characters."""
    sentence = message.partition("\n")[0].partition(". ")[0]
    return sentence if len(sentence) <= MAX_SENTENCE else f"{sentence[: MAX_SENTENCE - 1]}…"


def record_file(out: Path, cell: Cell) -> Path:
    return out / f"{cell.name}.json"


def write_record(out: Path, cell: Cell, record: CellRecord) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False)
    atomic_write_text(record_file(out, cell), f"{text}\n")


def read_records(out: Path, cells: Sequence[Cell]) -> tuple[dict[str, CellRecord], list[Cell]]:
    """The records of cells by name, and the cells whose record was made with other settings.

    A record that lacks suites of its cell counts as that of the cell if the settings of its
    training and of the suites that it has are the cell's: the plan has gained suites since.

    Raises `RunError` for a damaged file.
    """
    found: dict[str, CellRecord] = {}
    outdated = []
    for cell in cells:
        file = record_file(out, cell)
        if not file.is_file():
            continue
        record = read_json_as(file, CellRecord)
        if record.cell != cell.name:
            raise RunError(
                f"{file} is the result of {record.cell}", f"rename it to {record.cell}.json"
            )
        if record.digest in (cell.digest, cell.digest_with(_answered(cell, record))):
            found[cell.name] = record
        else:
            outdated.append(cell)
    return found, outdated


def _answered(cell: Cell, record: CellRecord) -> tuple[SuiteUse, ...]:
    return tuple(use for use in cell.suites if record.suite(use.title) is not None)


def missing_suites(cell: Cell, record: CellRecord) -> tuple[SuiteUse, ...]:
    """The suites of a cell that its record has no answers to."""
    return tuple(use for use in cell.suites if record.suite(use.title) is None)


def finished_records(records: Mapping[str, CellRecord]) -> dict[str, CellRecord]:
    """The records of finished cells, by cell."""
    return {name: one for name, one in records.items() if one.status == "finished"}
