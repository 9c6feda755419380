"""Evaluation of several models on several suites, and retention of the teacher's scores."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.evaluate.evaluator import EvalOptions, evaluate_model, open_suite
from mmmamba_cli.evaluate.interfaces import EvalModel
from mmmamba_cli.evaluate.library import find_suite
from mmmamba_cli.evaluate.process_group import (
    SINGLE_PROCESS,
    ProcessGroup,
    run_on_all,
    run_on_main_first,
)
from mmmamba_cli.evaluate.result import RETENTION, Result, ScoredSuite, json_text
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.runner import EvalCallbacks, raise_if_stopped
from mmmamba_cli.evaluate.score_retention import Retention, compare_with_teacher
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.evaluate.vlmeval_table import VLMEvalTable
from mmmamba_cli.runs import TEACHER, ResolvedModel


def evaluate_models(
    models: Sequence[ResolvedModel],
    load: Callable[[ResolvedModel], EvalModel],
    suites: Sequence[str],
    folder: Path,
    options: EvalOptions,
    callbacks: EvalCallbacks,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[list[Result], list[Retention]]:
    """Evaluate every model on every suite; files go to `folder`/MODEL/SUITE.

    `load` loads a model when its turn comes; one at a time is in memory. If the last model is the
    teacher, the retention of the others is computed against it. Returns the results by suite, then
    by model, and the retention.

    With several processes in `group`, each loads every model and gets the same results.

    Raises:
        EvalStopped: if `callbacks.is_stopped` on some process.
    """
    # Open all tables before the first model is loaded, so that a bad table is reported early.
    opened = run_on_main_first(group, lambda: _open_suites(suites, options, callbacks))
    scored: dict[str, list[ScoredSuite]] = {suite.name: [] for suite, _, _ in opened}
    for resolved in models:
        callbacks.say(f"loading {resolved.name}")
        with callbacks.if_interrupted(
            f"{resolved.name} was not asked yet; answers that are kept in {folder} stay, and the "
            "same command goes on"
        ):
            raise_if_stopped(group, callbacks)
            model = run_on_all(group, partial(load, resolved))
        if options.max_tiles is not None and not model.identity.uses_max_tiles:
            callbacks.warn(
                f"{resolved.name}: --max-tiles is not used, since its processor has its own "
                "resolution of pictures"
            )
        for suite, table, rows in opened:
            place = folder / resolved.name / suite.name
            scored[suite.name].append(
                _evaluate_with_progress(model, suite, table, rows, place, options, callbacks, group)
            )
        # Free the model before the next one is loaded: two may not fit.
        del model
        gc.collect()
    has_teacher = models[-1].name == TEACHER
    retentions = _write_retentions(scored, folder, options, group) if has_teacher else []
    return [one.result for found in scored.values() for one in found], retentions


def _evaluate_with_progress(
    model: EvalModel,
    suite: Suite,
    table: VLMEvalTable,
    rows: Sequence[Row],
    folder: Path,
    options: EvalOptions,
    callbacks: EvalCallbacks,
    group: ProcessGroup,
) -> ScoredSuite:
    """`evaluate_model`, with a progress display and a message for an interrupt."""
    answered = 0

    def count(more: int) -> None:
        nonlocal answered
        answered += more
        advance(more)

    with (
        callbacks.if_interrupted(
            lambda: (
                f"{answered} of {len(rows)} answers to {suite.name} are kept in {folder}; the same "
                "command goes on"
            )
        ),
        callbacks.progress(f"{model.identity.name}: {suite.title}", len(rows)) as advance,
    ):
        counting = replace(callbacks, advance=count)
        return evaluate_model(model, suite, table, rows, folder, options, counting, group)


def _open_suites(
    names: Sequence[str], options: EvalOptions, callbacks: EvalCallbacks
) -> list[tuple[Suite, VLMEvalTable, list[Row]]]:
    suites = [find_suite(name) for name in names]
    with callbacks.timed("opening the suites"):
        return [(suite, *open_suite(suite, options, callbacks.say)) for suite in suites]


def _write_retentions(
    scored: Mapping[str, Sequence[ScoredSuite]],
    folder: Path,
    options: EvalOptions,
    group: ProcessGroup,
) -> list[Retention]:
    """The retention of every student by suite, the teacher being the last model; also as files."""
    found = []
    for suite, (*students, teacher) in scored.items():
        for student in students:
            parts = compare_with_teacher([student], teacher, options.seed)
            file = folder / student.result.model.name / suite / RETENTION
            group.run_on_main(partial(atomic_write_text, file, json_text(parts)))
            found += parts
    return found
