"""`mmmamba eval`: scores of models on suites, and retention against the teacher."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import (
    err,
    if_interrupted,
    plain_warnings,
    print_json,
    print_line,
    print_table,
    print_warning,
    progress,
    warn_not_final,
)
from mmmamba_cli.cli.options import (
    DEFAULT_RUN,
    MAX_SEED,
    AsJson,
    Device,
    DType,
    FromCurrent,
    Models,
    RunFolder,
    TeacherPath,
)
from mmmamba_cli.cli.quiet_timer import import_notes, time_notes
from mmmamba_cli.errors import DataError
from mmmamba_cli.interrupts import INTERRUPTED

if TYPE_CHECKING:
    from mmmamba_cli.evaluate import EvalCallbacks, EvalModel, EvalOptions, Result, Retention
    from mmmamba_cli.evaluate.external_results import ExternalResult
    from mmmamba_cli.runs import ResolvedModel

    Evaluated = tuple[list[Result], list[Retention]]

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
    gpus: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Evaluate on N GPUs of this machine, with one process each; with --device cpu, in "
            "N processes on the CPU (default: 1).",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, metavar="N", help="Seed of the confidence intervals."),
    ] = 0,
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
    stored in evals/ of the run. For several machines start it under torchrun: torchrun ... -m
    mmmamba_cli -- eval ...
    """
    from mmmamba_cli.evaluate import EvalOptions, evaluate_files, evaluate_with_kit
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
        _require_one_process("--predictions", gpus)
        _print_results(evaluate_files(predictions, names, folder, options), [], compare, as_json)
        return
    job = EvalCommand(
        run=run,
        product=product,
        paths=tuple(model or ()),
        teacher=teacher,
        teacher_path=teacher_path,
        suites=tuple(names),
        folder=folder,
        options=options,
        device=device,
        dtype=dtype,
    )
    if kit is not None:
        _require_one_process(f"--with {kit}", gpus)
        load = partial(_load, device=device, dtype=dtype)
        found = evaluate_with_kit(kit, _models(job), load, names, folder, options, _callbacks())
        _print_external_results(kit, found, as_json)
        return
    results, retentions = _evaluate(job, gpus)
    if results:
        _print_results(results, retentions, compare, as_json)


@dataclass(frozen=True)
class EvalCommand:
    """The arguments of the command, for each process."""

    run: Path
    product: str | None
    paths: tuple[Path, ...]
    teacher: bool
    teacher_path: Path | None
    suites: tuple[str, ...]
    folder: Path
    options: EvalOptions
    device: str | None
    dtype: str
    # Whether a launcher started this process, which then prints messages about signals.
    launched: bool = False


def is_under_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _require_one_process(option: str, gpus: int | None) -> None:
    if gpus is not None or is_under_torchrun():
        raise DataError(f"{option} runs in one process", "leave out --gpus, and torchrun")


def _evaluate(job: EvalCommand, gpus: int | None) -> Evaluated:
    """Evaluate in this process or as one of several; no results on processes other than 0."""
    processes = 1
    if gpus is not None:
        from mmmamba_cli.distributed.launcher import count_processes, launch

        processes = count_processes(gpus, job.device)
    if processes > 1:
        print_line(f"starting {processes} processes", to_stderr=True)
        found = launch(
            evaluate_launched_share, replace(job, launched=True), processes, unit="batch"
        )
    elif is_under_torchrun():
        found = evaluate_share(job)
    else:
        from mmmamba_cli.evaluate import evaluate_models

        load = partial(_load, device=job.device, dtype=job.dtype)
        models, callbacks = _models(job), _callbacks()
        return evaluate_models(models, load, job.suites, job.folder, job.options, callbacks)
    if found is None:
        raise typer.Exit(INTERRUPTED)
    return found


def evaluate_launched_share(job: EvalCommand) -> Evaluated | None:
    """`evaluate_share` in a process of `--gpus`, with notes about its imports."""
    with import_notes():
        return evaluate_share(job)


def evaluate_share(job: EvalCommand) -> Evaluated | None:
    """Evaluate as one of several processes; results on process 0, None if stopped."""
    from mmmamba_cli.cli import escape_unencodable_output
    from mmmamba_cli.cli.stop_request import StopRequest
    from mmmamba_cli.distributed import join_world
    from mmmamba_cli.evaluate import EvalCallbacks, EvalStopped, evaluate_models
    from mmmamba_cli.evaluate.process_group import run_on_main_first
    from mmmamba_cli.processing.images import ImageNote

    with ExitStack() as stack:
        if job.launched:
            # The launcher did this for itself only.
            escape_unencodable_output()
            stack.enter_context(plain_warnings())
        world = stack.enter_context(join_world(job.device))
        if not world.is_main:
            # Every process would print the same warnings, except those about its own pictures.
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            warnings.filterwarnings("default", category=ImageNote)
        stop = stack.enter_context(
            StopRequest(prints=world.is_main and not job.launched, unit="batch")
        )
        callbacks = _callbacks() if world.is_main else EvalCallbacks()
        callbacks = replace(callbacks, is_stopped=lambda: stop.received)
        models = run_on_main_first(world, lambda: _models(job, warns=world.is_main))
        load = partial(_load, device=str(world.device), dtype=job.dtype, notes=world.is_main)
        try:
            found = evaluate_models(
                models, load, job.suites, job.folder, job.options, callbacks, world
            )
        except EvalStopped:
            return None
    return found if world.is_main else ([], [])


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise DataError("--suite names no suite", "give names, as in --suite mme,pope")
    return names


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise DataError(f"--batch is {text!r}, expected a number from 1 on, or auto")
    return int(text)


def _models(job: EvalCommand, warns: bool = True) -> list[ResolvedModel]:
    """The models to evaluate, under unique names, the teacher last."""
    from mmmamba_cli import runs

    if job.paths and job.product is not None:
        raise DataError("--from and --model exclude each other", "give one of them")
    found = [runs.resolve_path(path) for path in job.paths]
    if not job.paths:
        found.append(runs.resolve_product(runs.Run(job.run), job.product))
    if job.teacher or job.teacher_path is not None:
        found.append(runs.resolve_teacher(runs.Run(job.run), job.teacher_path))
    runs.check_unique_names(
        [one.name for one in found],
        ", and results lie under that name",
        hint="evaluate them with different --out, or rename a folder",
    )
    for one in found:
        if warns and one.origin == "product" and one.final is False:
            warn_not_final(one.name)
    return found


def _load(found: ResolvedModel, device: str | None, dtype: str, notes: bool = True) -> EvalModel:
    from mmmamba_cli.evaluate import model_adapter

    with time_notes(f"loading {found.name}", lambda: notes):
        return model_adapter.load_eval_model(found, device, dtype)


def _callbacks() -> EvalCallbacks:
    from mmmamba_cli.evaluate import EvalCallbacks

    return EvalCallbacks(
        say=lambda text: err().print(text, markup=False, highlight=False, soft_wrap=True),
        warn=print_warning,
        progress=lambda title, total: progress(title, total, "answers"),
        timed=time_notes,
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
