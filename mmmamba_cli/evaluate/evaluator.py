"""One call of `mmmamba eval`: models x suites, answers, scores, retention, files."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate.answer_cache import AnswerStore, settings_key
from mmmamba_cli.evaluate.fingerprint import answering_versions, code_digest, pictures_digest
from mmmamba_cli.evaluate.interfaces import EvalModel, Identity
from mmmamba_cli.evaluate.library import built_table
from mmmamba_cli.evaluate.predictions import read_predictions
from mmmamba_cli.evaluate.prompts import prompt_of
from mmmamba_cli.evaluate.result import (
    RESULT,
    RETENTION,
    TIMING,
    DataPart,
    ModelPart,
    NotAsked,
    Result,
    Retention,
    json_text,
    retention,
    rule_part,
)
from mmmamba_cli.evaluate.rows import Row, belongs, limit_rows, read_rows
from mmmamba_cli.evaluate.runner import Asked, Watch, ask_all
from mmmamba_cli.evaluate.scoring import Tally, find_rule, versioned
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.evaluate.vlmeval_table import Table
from mmmamba_cli.runs.manifest import command_line, utc_timestamp

SEED = 0
ENVIRONMENT = "LMUData"
HOME = Path("~/LMUData")
LOCAL = "_local"


@dataclass(frozen=True)
class Options:
    """What the caller decides beside models and suites."""

    data: Path | None = None
    limit: int | None = None
    batch: int | None = None
    max_tiles: int | None = None
    max_new_tokens: int | None = None
    by_likelihood: bool = False
    rule: str | None = None
    seed: int = SEED


class Named(Protocol):
    """A model that is loaded when its turn comes."""

    @property
    def name(self) -> str: ...

    @property
    def open(self) -> Callable[[], EvalModel]: ...


@dataclass
class Scored:
    """A result, and what retention needs of it."""

    result: Result
    tallies: dict[str, Tally]
    rows: Sequence[Row] = field(default_factory=list)


def find_table(
    suite: Suite, data: Path | None, say: Callable[[str], None] = lambda text: None
) -> Path:
    """The suite's TSV, made first where the suite can make it and no --data is given.

    Raises `DataError` that says where it was looked for.
    """
    found = _table_file(suite, data)
    if found is None and suite.build and data is None:
        found = built_table(suite, say)
    if found is None:
        raise DataError(
            f"suite {suite.name} needs {suite.dataset}.tsv, which is not in {_data_folder(data)}; "
            f"it is looked for in --data DIR, else ${ENVIRONMENT}, else {HOME}",
            "it is VLMEvalKit's table: tab-separated, with the columns "
            f"{', '.join(suite.columns)} and image (base64, or another row's index) or image_path",
        )
    return found


def _table_file(suite: Suite, data: Path | None) -> Path | None:
    folder = _data_folder(data)
    places = [folder / f"{suite.dataset}{ending}.tsv" for ending in ("", LOCAL)]
    return next((place for place in places if place.is_file()), None)


def _data_folder(data: Path | None) -> Path:
    return data or Path(os.environ.get(ENVIRONMENT) or HOME).expanduser()


def open_suite(
    suite: Suite, options: Options, say: Callable[[str], None] = lambda text: None
) -> tuple[Table, list[Row]]:
    """The suite's table and the rows to be asked; `say` is told if the table is being made.

    Raises `DataError`.
    """
    suite.scoring(options.rule)
    table = Table(find_table(suite, options.data, say), suite.columns)
    rows = read_rows(table.cells, suite, str(table.file))
    return table, limit_rows(rows, suite, options.limit)


def evaluate_model(
    model: EvalModel,
    suite: Suite,
    table: Table,
    rows: Sequence[Row],
    folder: Path,
    options: Options,
    watch: Watch,
) -> Scored:
    """Ask one model one suite, score it, and write everything into `folder`."""
    settings = _settings(model, suite, options)
    prompts = [
        prompt_of(
            row, suite, table, max_tiles=options.max_tiles, by_likelihood=options.by_likelihood
        )
        for row in rows
    ]
    pictures = pictures_digest(one for prompt in prompts for one in prompt.pictures)
    answers_to = {
        "model": model.identity.content_hash,
        "suite": suite.name,
        "questions": suite.questions_digest,
        "data": table.sha256,
        "pictures": pictures,
        "versions": answering_versions(),
        **settings,
    }
    began = time.perf_counter()
    with AnswerStore(folder, answers_to, watch.warn, watch.say) as store:
        asked = ask_all(
            model,
            prompts,
            store,
            max_new_tokens=settings["max_new_tokens"],
            batch=options.batch,
            watch=watch,
        )
        # A row that could not be asked has an empty answer; `score` counts it as wrong.
        answers = {
            row.index: "" if row.index in asked.not_asked else store.answers[row.index].text
            for row in rows
        }
    seconds = time.perf_counter() - began
    data = _data_part(suite, table.file.name, table.sha256, table.cells, rows).model_copy(
        update={
            "pictures": pictures,
            "without_image": sum(not prompt.pictures for prompt in prompts),
        }
    )
    not_asked = tuple(NotAsked(index=i, reason=why) for i, why in asked.not_asked.items())
    if not_asked:
        watch.warn(
            f"{len(not_asked):,} of {len(rows):,} rows could not be asked and count as wrong; "
            f"row {not_asked[0].index}: {not_asked[0].reason}"
        )
    scored = score(suite, rows, answers, data, model.identity, settings, options, not_asked)
    _write(folder, scored, answers)
    if asked.answered:
        _write_timing(folder, asked, seconds)
    return scored


def _settings(model: EvalModel, suite: Suite, options: Options) -> dict[str, Any]:
    """What answers depend on beside the model's weights and the questions."""
    return {
        "max_tiles": options.max_tiles or suite.max_tiles,
        "max_new_tokens": options.max_new_tokens or suite.max_new_tokens,
        "answers": "chosen by likelihood" if options.by_likelihood else "generated",
        "limit": options.limit,
        "code": code_digest(),
        **model.identity.answers_depend_on,
    }


def _data_part(
    suite: Suite,
    file: str,
    sha256: str,
    cells: Sequence[Mapping[str, str]],
    rows: Sequence[Row],
) -> DataPart:
    """What of a table was asked; `cells` are all its rows, `rows` those asked."""
    own = [cell for cell in cells if belongs(cell, suite)]
    asked = {row.category for row in rows}
    left = dict.fromkeys(cell.get("category", "") for cell in own)
    return DataPart(
        file=file,
        sha256=sha256,
        rows=len(own),
        used=len(rows),
        asked=settings_key({"rows": [row.index for row in rows]}) if len(rows) < len(own) else None,
        categories_not_asked=tuple(name for name in left if name not in asked),
    )


def evaluate_predictions(file: Path, suite: Suite, folder: Path, options: Options) -> Scored:
    """Score answers that are in a file; the suite's TSV tells the questions where it is there.

    Without it the file's own columns do. With a limit, rows are taken from those the file answers.
    Raises `DataError` for what is missing in either.
    """
    suite.scoring(options.rule)
    given = read_predictions(file)
    needed = [*suite.columns, *(["image_path"] if suite.unit in ("pair", "picture") else [])]
    if _table_file(suite, options.data) is not None or not given.has(needed):
        table, rows = open_suite(suite, replace(options, limit=None))
        cells, name, digest = table.cells, table.file.name, table.sha256
    else:
        cells, name, digest = given.cells, file.name, given.sha256
        rows = read_rows(cells, suite, str(file))
    if options.limit is not None:
        rows = limit_rows(given.answered_units(rows) or rows, suite, options.limit)
    data = _data_part(suite, name, digest, cells, rows)
    answers = given.answers(rows)
    identity = Identity(name=file.name, content_hash=given.sha256, kind="predictions")
    scored = score(suite, rows, answers, data, identity, {"answers": "from a file"}, options)
    _write(folder, scored, answers)
    return scored


def score(
    suite: Suite,
    rows: Sequence[Row],
    answers: dict[str, str],
    data: DataPart,
    identity: Identity,
    settings: dict[str, Any],
    options: Options,
    not_asked: tuple[NotAsked, ...] = (),
) -> Scored:
    """The suite's rules, or one of them, over answers by index."""
    refused = {one.index for one in not_asked}
    said = [
        _wrong_answer(suite, row) if row.index in refused else answers[row.index] for row in rows
    ]
    scoring = suite.scoring(options.rule)
    tallies = {name: find_rule(function)(rows, said) for name, function in scoring.items()}
    parts = [
        rule_part(name, versioned(scoring[name]), tally, answers, options.seed)
        for name, tally in tallies.items()
    ]
    result = Result(
        suite=suite.name,
        title=suite.title,
        version=suite.version,
        suite_digest=suite.digest,
        data=data,
        model=ModelPart(
            name=identity.name,
            content_hash=identity.content_hash,
            kind=identity.kind,
            final=identity.final,
        ),
        settings=settings,
        rules=tuple(parts),
        not_asked=not_asked,
        seed=options.seed,
        versions=answering_versions(),
    )
    return Scored(result, tallies, rows)


def _wrong_answer(suite: Suite, row: Row) -> str:
    """An answer that no rule takes for a right one: POPE's takes an empty answer for yes."""
    if suite.choices == ("Yes", "No"):
        return "No" if row.answer.lower() == "yes" else "Yes"
    return ""


def compare_with_teacher(
    students: Iterable[Scored], teacher: Scored, seed: int = SEED
) -> list[Retention]:
    """Retention of each student by each rule of the suite."""
    suite, name = teacher.result.suite, teacher.result.model.name
    return [
        retention(
            suite,
            rule,
            (student.result.model.name, student.tallies[rule]),
            (name, tally),
            len(teacher.rows),
            seed,
        )
        for student in students
        for rule, tally in teacher.tallies.items()
    ]


def write_retention(folder: Path, parts: Sequence[Retention]) -> None:
    atomic_write_text(folder / RETENTION, json_text(parts))


def _write(folder: Path, scored: Scored, answers: dict[str, str]) -> None:
    """`result.json`, and the answers as the kits write them, for a judge or another scorer."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / RESULT, json_text(scored.result))
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["index", "question", "answer", "category", "prediction"])
    for row in scored.rows:
        writer.writerow([row.index, row.question, row.answer, row.category, answers[row.index]])
    atomic_write_text(folder / "predictions.tsv", text.getvalue())


def _write_timing(folder: Path, asked: Asked, seconds: float) -> None:
    """What is not the same twice: when, how long, in what batches."""
    import json

    timing = {
        "finished": utc_timestamp(),
        "command": command_line(),
        "answered": asked.answered,
        "seconds": round(seconds, 3),
        "samples_per_second": round(asked.answered / max(seconds, 1e-9), 3),
        "batches": len(asked.batches),
        "largest_batch": max(asked.batches, default=0),
        "limit": asked.limit.as_dict(),
        "halved": asked.halved,
    }
    atomic_write_text(folder / TIMING, json.dumps(timing, indent=2) + "\n")
