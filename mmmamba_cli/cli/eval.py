"""`mmmamba eval`: scores of models on suites, and retention against the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import (
    err,
    if_interrupted,
    print_json,
    print_table,
    print_warning,
    progress,
    warn_not_final,
)
from mmmamba_cli.cli.options import (
    DEFAULT_RUN,
    AsJson,
    Device,
    DType,
    FromCurrent,
    Models,
    RunFolder,
    TeacherPath,
)
from mmmamba_cli.cli.quiet_timer import time_notes
from mmmamba_cli.errors import DataError

if TYPE_CHECKING:
    from mmmamba_cli.evaluate import EvalCallbacks, EvalModel, Result, Retention
    from mmmamba_cli.evaluate.external_results import ExternalResult
    from mmmamba_cli.runs import ResolvedModel

RIGHT = ("score", "rows", "unreadable", "teacher", "retention", "chance", "above chance")


class Answers(StrEnum):
    """How a model answers."""

    GENERATED = "generated"
    LIKELIHOOD = "likelihood"


def command(
    suite: Annotated[
        str, typer.Option(metavar="NAME,...", help="Suites; with --with, tasks of that kit.")
    ],
    run: RunFolder = DEFAULT_RUN,
    product: FromCurrent = None,
    model: Models = None,
    teacher: Annotated[
        bool,
        typer.Option("--teacher", help="Also evaluate the teacher and report score retention."),
    ] = False,
    teacher_path: TeacherPath = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Score the answers in a file (.tsv, .csv, .jsonl, .xlsx)."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the suites' TSVs (default: $LMUData, then ~/LMUData)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for results (default: evals/ of the run)."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Questions per suite, spread over its categories."),
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="N|auto", help="Prompts per batch; auto: as many as fit.")
    ] = "auto",
    max_tiles: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Maximum tiles per picture (default: the suite's)."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Maximum length of an answer, in tokens (default: the suite's).",
        ),
    ] = None,
    answers: Annotated[
        Answers,
        typer.Option(
            metavar="WAY",
            help="generated, or likelihood: the most likely of yes and no, of the options, or of "
            "the right answer and three wrong ones of its category.",
        ),
    ] = Answers.GENERATED,
    choose: Annotated[
        bool,
        typer.Option(
            "--choose",
            help="As --answers likelihood, but answers to open questions are generated.",
        ),
    ] = False,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Score by this rule only; a name without a date is its newest version.",
        ),
    ] = None,
    device: Device = None,
    dtype: DType = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the confidence intervals.")] = 0,
    kit: Annotated[
        str | None,
        typer.Option(
            "--with", metavar="KIT", help="Evaluate with another kit: vlmeval or lm-eval."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also print published results.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate models on suites and compare them with their teacher.

    Answers are scored by named rules. Resumes an interrupted evaluation. Answers and results are
    stored in evals/ of the run.
    """
    from mmmamba_cli.evaluate import EvalOptions, evaluate_files, evaluate_models, evaluate_with_kit
    from mmmamba_cli.evaluate.result import EVALS

    names = _names(suite)
    options = EvalOptions(
        data=data,
        limit=limit,
        batch=_batch(batch),
        max_tiles=max_tiles,
        max_new_tokens=max_new_tokens,
        by_likelihood=choose or answers is Answers.LIKELIHOOD,
        open_by_likelihood=answers is Answers.LIKELIHOOD,
        rule=rule,
        seed=seed,
    )
    folder = out or run / EVALS
    if predictions is not None:
        if model or teacher or kit or product:
            raise DataError("--predictions needs no model", "leave out the options that name one")
        _print_results(evaluate_files(predictions, names, folder, options), [], compare, as_json)
        return
    models = _models(run, product, model, teacher, teacher_path)
    load = partial(_load, device=device, dtype=dtype)
    if kit is not None:
        found = evaluate_with_kit(kit, models, load, names, folder, options, _callbacks())
        _print_external_results(kit, found, as_json)
        return
    results, retentions = evaluate_models(models, load, names, folder, options, _callbacks())
    _print_results(results, retentions, compare, as_json)


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise DataError("--suite names no suite", "give names, as in --suite mme,pope")
    return names


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise DataError(f"--batch is {text!r}, expected a number from 1 on, or auto")
    return int(text)


def _models(
    run: Path,
    product: str | None,
    paths: Sequence[Path] | None,
    teacher: bool,
    teacher_path: Path | None,
) -> list[ResolvedModel]:
    """The models to evaluate, under unique names, the teacher last."""
    from mmmamba_cli import runs

    if paths and product is not None:
        raise DataError("--from and --model exclude each other", "give one of them")
    found = [runs.resolve_path(path) for path in paths or ()]
    if not paths:
        found.append(runs.resolve_product(runs.Run(run), product))
    if teacher or teacher_path is not None:
        found.append(runs.resolve_teacher(runs.Run(run), teacher_path))
    runs.check_unique_names(
        [one.name for one in found],
        ", and results lie under that name",
        hint="evaluate them with different --out, or rename a folder",
    )
    for one in found:
        if one.origin == "product" and one.final is False:
            warn_not_final(one.name)
    return found


def _load(found: ResolvedModel, device: str | None, dtype: str) -> EvalModel:
    from mmmamba_cli.evaluate import model_adapter

    with time_notes(f"loading {found.name}"):
        return model_adapter.load_eval_model(found, device, dtype)


def _callbacks() -> EvalCallbacks:
    from mmmamba_cli.evaluate import EvalCallbacks

    return EvalCallbacks(
        say=lambda text: err().print(text, markup=False, highlight=False, soft_wrap=True),
        warn=print_warning,
        progress=lambda title, total: progress(title, total, "answers"),
        if_interrupted=if_interrupted,
    )


def _print_external_results(kit: str, found: Sequence[ExternalResult], as_json: bool) -> None:
    if as_json:
        print_json([one.as_dict() for one in found])
        return
    rows = [
        (one.model, task, metric, value)
        for one in found
        for task, metrics in one.scores.items()
        for metric, value in metrics.items()
    ]
    print_table(("model", "task", "metric", f"score by {kit}"), rows)


def _print_results(
    results: Sequence[Result], retentions: Sequence[Retention], compare: bool, as_json: bool
) -> None:
    from mmmamba_cli.evaluate import find_suite, published_rows, tables

    published = published_rows() if compare else []
    if as_json:
        found = {
            "results": [result.model_dump(mode="json") for result in results],
            "retention": [part.model_dump(mode="json") for part in retentions],
        }
        print_json({**found, "published": published} if compare else found)
        return
    print_table(*tables.summary(results), right=RIGHT)
    for result in results:
        for part in result.rules:
            if part.categories:
                heading, rows = tables.categories(result, part)
                print_table(heading, rows, title=result.model.name, right=heading[1:])
    if retentions:
        print_table(*tables.retention_table(retentions), right=RIGHT)
    if compare:
        suites = {result.suite: find_suite(result.suite) for result in results}
        heading, rows = tables.comparison(results, suites, published)
        print_table(heading, rows, right=heading[1:-1])
    for result in results:
        for remark in tables.remarks(result):
            print_warning(f"{result.model.name}, {remark}")
