"""`mmmamba eval`: what a model still knows, by suite, beside its teacher."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from mmmamba_cli.errors import DataError

if TYPE_CHECKING:
    from mmmamba_cli.evaluate import EvalModel, Options, Result, Retention, Scored, Suite
    from mmmamba_cli.runs import ResolvedModel

EVALS = "evals"
RIGHT = ("score", "rows", "unreadable", "teacher", "retention")


def command(
    suite: Annotated[
        str, typer.Option(metavar="NAME,...", help="Suites; with --with, tasks of that kit.")
    ],
    run: RunFolder = DEFAULT_RUN,
    product: FromCurrent = None,
    model: Models = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Ask the run's teacher too, and tell retention.")
    ] = False,
    teacher_path: TeacherPath = None,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Score these answers (.tsv, .csv, .jsonl, .xlsx)."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the suites' TSVs; else $LMUData, ~/LMUData."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go; else the run's evals.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="So many questions of each suite, spread over its categories."
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="N|auto", help="Prompts at a time; auto takes what fits.")
    ] = "auto",
    max_tiles: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most tiles per picture; the suite's if not given."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Longest answer; the suite's if not given."),
    ] = None,
    choose: Annotated[
        bool, typer.Option("--choose", help="Take the likeliest choice; generate nothing.")
    ] = False,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Score by this rule only; without a date its newest version."
        ),
    ] = None,
    device: Device = None,
    dtype: DType = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the error estimates.")] = 0,
    kit: Annotated[
        str | None,
        typer.Option("--with", metavar="KIT", help="Let another kit ask: vlmeval or lm-eval."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Print published results beside ours.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a model the questions of suites, and score its answers by named rules.

    Goes on where it was stopped. Answers and results are kept in the run, under evals/.
    """
    from mmmamba_cli.evaluate import Options

    names = _names(suite)
    options = Options(
        data=data,
        limit=limit,
        batch=_batch(batch),
        max_tiles=max_tiles,
        max_new_tokens=max_new_tokens,
        by_likelihood=choose,
        rule=rule,
        seed=seed,
    )
    folder = out or run / EVALS
    if predictions is not None:
        if model or teacher or kit or product:
            raise DataError("--predictions needs no model", "leave out the options that name one")
        scored = [_from_file(predictions, name, folder, options) for name in names]
        _say([one.result for one in scored], [], compare, as_json)
        return
    models = _models(run, product, model, teacher, teacher_path)
    load = partial(_load, device=device, dtype=dtype)
    if kit is not None:
        _with_kit(kit, models, load, names, options, folder, as_json)
        return
    results, kept = _ask(models, load, names, options, folder)
    _say(results, kept, compare, as_json)


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise DataError("--suite names no suite", "as in --suite mme,pope")
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
        raise DataError("--from names a product of the run, --model a path", "give one of them")
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

    return model_adapter.load_eval_model(found, device, dtype)


def _ask(
    models: Sequence[ResolvedModel],
    load: Callable[[ResolvedModel], EvalModel],
    names: Sequence[str],
    options: Options,
    folder: Path,
) -> tuple[list[Result], list[Retention]]:
    """Every model every suite; retention by the last one, if that is the teacher."""
    from mmmamba_cli.evaluate import compare_with_teacher, find_suite, open_suite, write_retention
    from mmmamba_cli.runs import TEACHER

    suites = [find_suite(name) for name in names]
    # All tables before any model: what is wrong with them is found in time.
    opened = [open_suite(suite, options, _tell) for suite in suites]
    scored: dict[str, list[Scored]] = {suite.name: [] for suite in suites}
    for one in models:
        _tell(f"loading {one.name}")
        with if_interrupted(
            f"{one.name} was not asked yet; answers that are kept in {folder} stay, and the "
            "same command goes on"
        ):
            model = load(one)
        for suite, (table, rows) in zip(suites, opened, strict=True):
            place = folder / one.name / suite.name
            scored[suite.name].append(_ask_one(model, suite, table, rows, place, options))
        # Before the next one is loaded: two may not fit.
        del model
        gc.collect()
    kept: list[Retention] = []
    if models[-1].name == TEACHER:
        for name, found in scored.items():
            for student in found[:-1]:
                parts = compare_with_teacher([student], found[-1], options.seed)
                write_retention(folder / student.result.model.name / name, parts)
                kept += parts
    return [one.result for found in scored.values() for one in found], kept


def _tell(text: str) -> None:
    err().print(text, markup=False, highlight=False, soft_wrap=True)


def _ask_one(
    model: Any, suite: Suite, table: Any, rows: Any, folder: Path, options: Options
) -> Scored:
    from mmmamba_cli.evaluate import Watch, evaluate_model

    kept = 0

    def count(more: int) -> None:
        nonlocal kept
        kept += more
        advance(more)

    with (
        if_interrupted(
            lambda: (
                f"{kept} of {len(rows)} answers to {suite.name} are kept in {folder}; the same "
                "command goes on"
            )
        ),
        progress(f"{model.identity.name}: {suite.title}", len(rows), "answers") as advance,
    ):
        watch = Watch(say=_tell, warn=print_warning, advance=count)
        return evaluate_model(model, suite, table, rows, folder, options, watch)


def _from_file(file: Path, name: str, folder: Path, options: Options) -> Scored:
    from mmmamba_cli.evaluate import evaluate_predictions, find_suite

    suite = find_suite(name)
    return evaluate_predictions(file, suite, folder / file.stem / suite.name, options)


def _with_kit(
    kit: str,
    models: Sequence[ResolvedModel],
    load: Callable[[ResolvedModel], EvalModel],
    names: Sequence[str],
    options: Options,
    folder: Path,
    as_json: bool,
) -> None:
    from mmmamba_cli.checkpoint import atomic_write_text
    from mmmamba_cli.evaluate import find_evaluator
    from mmmamba_cli.evaluate.external_results import kit_result

    evaluate = find_evaluator(kit)
    found = []
    for one in models:
        place = folder / one.name / kit
        with if_interrupted(
            f"{kit} was asking {one.name}, whose scores are not written; those of models "
            f"before it are in {folder}, and the same command begins with what {kit} keeps itself"
        ):
            model = load(one)
            place.mkdir(parents=True, exist_ok=True)
            scores = evaluate(model, names, options, place)
        found.append(kit_result(kit, model.identity, scores, options))
        del model
        gc.collect()
        atomic_write_text(place / "result.json", found[-1].json_text())
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


def _say(
    results: Sequence[Result], kept: Sequence[Retention], compare: bool, as_json: bool
) -> None:
    from mmmamba_cli.evaluate import find_suite, published_rows
    from mmmamba_cli.evaluate import tables as report

    tables = published_rows() if compare else []
    if as_json:
        found = {
            "results": [result.model_dump(mode="json") for result in results],
            "retention": [part.model_dump(mode="json") for part in kept],
        }
        print_json({**found, "published": tables} if compare else found)
        return
    print_table(*report.summary(results), right=RIGHT)
    for result in results:
        for part in result.rules:
            if part.categories:
                heading, rows = report.categories(result, part)
                print_table(heading, rows, title=result.model.name, right=heading[1:])
    if kept:
        print_table(*report.retention_table(kept), right=RIGHT)
    if compare:
        suites = {result.suite: find_suite(result.suite) for result in results}
        heading, rows = report.comparison(results, suites, tables)
        print_table(heading, rows, right=heading[1:-1])
    for result in results:
        for remark in report.remarks(result):
            print_warning(f"{result.model.name}, {remark}")
