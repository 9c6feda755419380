"""Evaluation of models on suites: answers, scores, retention and the files of results."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.errors import MmmambaWarning, name_some
from mmmamba_cli.evaluate.answer_cache import AnswerCache, settings_key
from mmmamba_cli.evaluate.candidates import Candidates, find_candidates
from mmmamba_cli.evaluate.fingerprint import code_digest, library_versions, pictures_digest
from mmmamba_cli.evaluate.interfaces import EvalModel, ModelIdentity
from mmmamba_cli.evaluate.library import existing_table, find_suite, find_table
from mmmamba_cli.evaluate.predictions import Predictions, read_predictions
from mmmamba_cli.evaluate.process_group import (
    SINGLE_PROCESS,
    ProcessGroup,
    require_equal,
    run_on_all,
)
from mmmamba_cli.evaluate.prompts import build_eval_prompt
from mmmamba_cli.evaluate.result import (
    CHOSEN_AMONG_ANSWERS,
    CHOSEN_BY_LIKELIHOOD,
    DEFAULT_SEED,
    GENERATED,
    TIMING,
    DataInfo,
    ModelInfo,
    Result,
    ScoredSuite,
    SkippedRow,
    rule_result,
    write_result,
)
from mmmamba_cli.evaluate.rows import Row, belongs_to_suite, limit_rows, read_rows
from mmmamba_cli.evaluate.runner import EvalCallbacks, InferenceStats, answer_prompts
from mmmamba_cli.evaluate.scoring import find_rule, versioned
from mmmamba_cli.evaluate.scoring.likelihood import (
    CANDIDATE_ACCURACY,
    LIKELIHOOD,
    candidate_accuracy,
)
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.evaluate.vlmeval_table import VLMEvalTable
from mmmamba_cli.runs.manifest import command_line, utc_timestamp


@dataclass(frozen=True)
class EvalOptions:
    """Settings of an evaluation beside its models and suites; None means the suite's own value.

    `limit` is a number of rows per suite, `batch` a number of prompts (None: as many as fit), and
    `seed` that of the bootstrap. `by_likelihood` chooses among options instead of generating,
    `open_by_likelihood` also answers open questions by a choice among answers of other rows.
    """

    data: Path | None = None
    limit: int | None = None
    batch: int | None = None
    max_tiles: int | None = None
    max_new_tokens: int | None = None
    by_likelihood: bool = False
    open_by_likelihood: bool = False
    rule: str | None = None
    seed: int = DEFAULT_SEED


def open_suite(
    suite: Suite, options: EvalOptions, say: Callable[[str], None] = lambda text: None
) -> tuple[VLMEvalTable, list[Row]]:
    """The suite's table and the rows to be asked; `say` announces that the table is being built.

    Raises `DataError`.
    """
    for function in suite.scoring(options.rule).values():
        # A misspelt rule is found before the questions are asked.
        find_rule(function)
    table = VLMEvalTable(find_table(suite, options.data, say), suite.columns)
    rows = read_rows(table.cells, suite, str(table.file))
    return table, limit_rows(rows, suite, options.limit)


def evaluate_model(
    model: EvalModel,
    suite: Suite,
    table: VLMEvalTable,
    rows: Sequence[Row],
    folder: Path,
    options: EvalOptions,
    callbacks: EvalCallbacks,
    group: ProcessGroup = SINGLE_PROCESS,
) -> ScoredSuite:
    """Evaluate one model on one suite and write all files into `folder`.

    Each process of `group` answers a part of the questions, then scores all answers; process 0
    writes the files, which do not depend on the number of processes. Their callbacks may differ.
    """
    candidates = _candidates(suite, table, rows) if options.open_by_likelihood else None
    settings = _settings(model, suite, options, candidates)
    every_candidate = candidates or itertools.repeat(None, len(rows))
    prompts = run_on_all(
        group,
        lambda: [
            build_eval_prompt(row, suite, table, options.max_tiles, options.by_likelihood, one)
            for row, one in zip(rows, every_candidate, strict=True)
        ],
    )
    pictures = group.run_on_main(
        lambda: pictures_digest(one for prompt in prompts for one in prompt.pictures)
    )
    answers_to = _cache_key(model, suite, table, pictures, settings)
    require_equal(group, "a model, suite, table or version", settings_key(answers_to))
    began = time.perf_counter()
    with AnswerCache(folder, answers_to, callbacks.warn, callbacks.say, group) as cache:
        stats = answer_prompts(
            model,
            prompts,
            cache,
            max_new_tokens=settings["max_new_tokens"],
            batch=options.batch,
            callbacks=callbacks,
            group=group,
        )
        # A row that could not be asked has an empty answer; `score_answers` counts it as wrong.
        answers = {
            row.index: "" if row.index in stats.not_asked else cache.answers[row.index].text
            for row in rows
        }
    seconds = time.perf_counter() - began
    skipped = _skipped_rows(stats, len(rows), callbacks.warn)
    data = _data_info(suite, table.file.name, table.sha256, table.cells, rows).model_copy(
        update={
            "pictures": pictures,
            "without_image": sum(not prompt.pictures for prompt in prompts),
        }
    )
    scored = score_answers(
        suite, rows, answers, data, model.identity, settings, options, skipped, candidates
    )
    group.run_on_main(lambda: _write_files(folder, scored, answers, stats, seconds, group.size))
    return scored


def _skipped_rows(
    stats: InferenceStats, asked: int, warn: Callable[[str], None]
) -> tuple[SkippedRow, ...]:
    """The rows that could not be asked, of `asked` ones; `warn` names the first."""
    skipped = tuple(SkippedRow(index=i, reason=why) for i, why in stats.not_asked.items())
    if skipped:
        warn(
            f"{len(skipped):,} of {asked:,} rows could not be asked and count as wrong; "
            f"row {skipped[0].index}: {skipped[0].reason}"
        )
    return skipped


def _candidates(suite: Suite, table: VLMEvalTable, rows: Sequence[Row]) -> list[Candidates]:
    """The candidates of `rows`; open ones come from the whole table, whatever part is asked."""
    every_row = read_rows(table.cells, suite, str(table.file))
    found = dict(
        zip((row.index for row in every_row), find_candidates(every_row, suite), strict=True)
    )
    return [found[row.index] for row in rows]


def _settings(
    model: EvalModel,
    suite: Suite,
    options: EvalOptions,
    candidates: Sequence[Candidates] | None,
) -> dict[str, Any]:
    """Everything beside weights and questions that can change an answer."""
    tiles = model.identity.uses_max_tiles
    way = CHOSEN_BY_LIKELIHOOD if options.by_likelihood else GENERATED
    if candidates is not None:
        is_open = any(one.open for one in candidates)
        way = CHOSEN_AMONG_ANSWERS if is_open else CHOSEN_BY_LIKELIHOOD
    return {
        "max_tiles": (options.max_tiles or suite.max_tiles) if tiles else None,
        "max_new_tokens": options.max_new_tokens or suite.max_new_tokens,
        "answers": way,
        "limit": options.limit,
        "code": code_digest(),
        **model.identity.answers_depend_on,
    }


def _cache_key(
    model: EvalModel,
    suite: Suite,
    table: VLMEvalTable,
    pictures: str | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that an answer depends on; `pictures` is the digest of their files."""
    return {
        "model": model.identity.content_hash,
        "suite": suite.name,
        "questions": suite.questions_digest,
        "data": table.sha256,
        "pictures": pictures,
        "versions": library_versions(),
        **settings,
    }


def _data_info(
    suite: Suite,
    file: str,
    sha256: str,
    cells: Sequence[Mapping[str, str]],
    rows: Sequence[Row],
) -> DataInfo:
    """The record of which rows of a table were asked; `cells` are all its rows."""
    own = [cell for cell in cells if belongs_to_suite(cell, suite)]
    asked = {row.category for row in rows}
    left = dict.fromkeys(cell.get("category", "") for cell in own)
    return DataInfo(
        file=file,
        sha256=sha256,
        rows=len(own),
        used=len(rows),
        asked=settings_key({"rows": [row.index for row in rows]}) if len(rows) < len(own) else None,
        categories_not_asked=tuple(name for name in left if name not in asked),
    )


def evaluate_files(
    file: Path, suites: Sequence[str], folder: Path, options: EvalOptions
) -> list[Result]:
    """Score the answers in a file for each suite; files go to `folder`/NAME/SUITE."""
    return [
        evaluate_predictions(file, suite, folder / file.stem / suite.name, options).result
        for suite in map(find_suite, suites)
    ]


def evaluate_predictions(
    file: Path, suite: Suite, folder: Path, options: EvalOptions
) -> ScoredSuite:
    """Score the answers in a file against the suite's TSV, or the file's own columns without one.

    With a limit, rows are taken from those that the file answers. Raises `DataError` if the file or
    the table lacks rows or columns.
    """
    suite.scoring(options.rule)
    given = read_predictions(file)
    needed = [*suite.columns, *(["image_path"] if suite.unit in ("pair", "picture") else [])]
    if existing_table(suite, options.data) is not None or not given.has(needed):
        table, rows = open_suite(suite, replace(options, limit=None))
        cells, name, digest = table.cells, table.file.name, table.sha256
    else:
        cells, name, digest = given.cells, file.name, given.sha256
        rows = read_rows(cells, suite, str(file))
    if options.limit is not None:
        rows = limit_rows(given.answered_units(rows) or rows, suite, options.limit)
    data = _data_info(suite, name, digest, cells, rows)
    answers = given.answers(rows)
    _warn_of_other_rows(given, cells, name)
    identity = ModelIdentity(name=file.name, content_hash=given.sha256, kind="predictions")
    settings = {"answers": "from a file"}
    scored = score_answers(suite, rows, answers, data, identity, settings, options)
    write_result(folder, scored, answers)
    return scored


def _warn_of_other_rows(given: Predictions, cells: Sequence[Mapping[str, str]], table: str) -> None:
    """Name answers in a file to rows that the table, of these cells, does not have."""
    others = given.left_out(cell["index"] for cell in cells)
    if others:
        message = (
            f"{given.file} answers {len(others):,} rows that {table} does not have, and they are "
            f"left out: index {name_some(others)}"
        )
        warnings.warn(MmmambaWarning(message), stacklevel=2)


def score_answers(
    suite: Suite,
    rows: Sequence[Row],
    answers: dict[str, str],
    data: DataInfo,
    identity: ModelIdentity,
    settings: dict[str, Any],
    options: EvalOptions,
    skipped: tuple[SkippedRow, ...] = (),
    candidates: Sequence[Candidates] | None = None,
) -> ScoredSuite:
    """Score answers, given by row index, by the suite's rules or by `options.rule`.

    Where open questions were answered by a choice among `candidates`, the rule is `likelihood`: the
    suite's rules are those of generated answers.
    """
    refused = {one.index for one in skipped}
    texts = [
        _wrong_answer(suite, row) if row.index in refused else answers[row.index] for row in rows
    ]
    scoring: Mapping[str, str] = suite.scoring(options.rule)
    if candidates is not None and options.rule is None and any(one.open for one in candidates):
        scoring = {LIKELIHOOD: CANDIDATE_ACCURACY}
        unit_scores = {LIKELIHOOD: candidate_accuracy(rows, texts, candidates)}
    else:
        unit_scores = {name: find_rule(function)(rows, texts) for name, function in scoring.items()}
    rules = [
        rule_result(name, versioned(scoring[name]), scores, answers, options.seed)
        for name, scores in unit_scores.items()
    ]
    result = Result(
        suite=suite.name,
        title=suite.title,
        version=suite.version,
        suite_digest=suite.digest,
        data=data,
        model=ModelInfo(
            name=identity.name,
            content_hash=identity.content_hash,
            kind=identity.kind,
            final=identity.final,
        ),
        settings=settings,
        rules=tuple(rules),
        not_asked=skipped,
        seed=options.seed,
        versions=library_versions(),
    )
    return ScoredSuite(result, unit_scores, rows)


def _wrong_answer(suite: Suite, row: Row) -> str:
    """An answer that every rule counts as wrong; InternVL's rule for POPE reads "" as yes."""
    if suite.choices == ("Yes", "No"):
        return "No" if row.answer.lower() == "yes" else "Yes"
    return ""


def _write_files(
    folder: Path,
    scored: ScoredSuite,
    answers: dict[str, str],
    stats: InferenceStats,
    seconds: float,
    processes: int,
) -> None:
    """Write the result, and what differs between equal runs: date, duration, number of batches."""
    write_result(folder, scored, answers)
    if not stats.answered:
        return
    timing = {
        "finished": utc_timestamp(),
        "command": command_line(),
        "processes": processes,
        "answered": stats.answered,
        "seconds": round(seconds, 3),
        "samples_per_second": round(stats.answered / max(seconds, 1e-9), 3),
        "batches": len(stats.batch_sizes),
        "largest_batch": max(stats.batch_sizes, default=0),
        "limit": stats.limit.as_dict(),
        "halved": stats.halvings,
    }
    atomic_write_text(folder / TIMING, json.dumps(timing, indent=2) + "\n")
