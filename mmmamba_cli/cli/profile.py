"""`mmmamba profile`: what a token costs in time and memory, beside the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import (
    err,
    if_interrupted,
    out,
    print_json,
    print_table,
    print_warning,
    progress,
)
from mmmamba_cli.cli.options import (
    DEFAULT_RUN,
    AsJson,
    Device,
    DType,
    Models,
    RunFolder,
    TeacherPath,
    complete_products,
    read_lengths,
)
from mmmamba_cli.errors import DataError

if TYPE_CHECKING:
    from mmmamba_cli.profiling import Plan, Profile, Subject
    from mmmamba_cli.profiling.subjects import WeightStore

FOLDER = "profile"


def command(
    run: RunFolder = DEFAULT_RUN,
    product: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="PRODUCT",
            help="Product of the run; else the newest of each layer plan. May be repeated.",
            autocompletion=complete_products,
        ),
    ] = None,
    teacher: Annotated[
        bool | None,
        typer.Option(
            "--teacher/--no-teacher",
            help="Measure the teacher too, as shipped and tuned; so unless --model.",
        ),
    ] = None,
    teacher_path: TeacherPath = None,
    model: Models = None,
    random: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="An architecture with random weights, as hovle-2.6b."),
    ] = None,
    attn_layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="With --random: students with N attention layers; else 0 and a quarter.",
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Tokens, as 512,8k,1m; the device's if not given."),
    ] = None,
    prefill: Annotated[
        bool,
        typer.Option("--prefill/--no-prefill", help="Measure the reading of the context too."),
    ] = True,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens read at a time; as suits each model if not given."
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Each student once more, its weights made int8.")
    ] = False,
    eager: Annotated[
        bool,
        typer.Option(
            "--eager",
            help="Students and the second teacher by PyTorch's own kernels, launched one by one.",
        ),
    ] = False,
    throughput: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Contexts at which batches are doubled for the most tokens a second; 0 for none.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Rows decoded together.")] = 1,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens timed for each model and context."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="SECONDS", help="Stop measuring then; 35 on a CPU, none on CUDA."
        ),
    ] = None,
    device: Device = None,
    dtype: DType = "auto",
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of random weights, caches and tokens.")
    ] = 0,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where the files go; else the run's profile, or ./profile."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure prefill, next token, memory, throughput and energy over context lengths.

    All models in one run, in turns, once they are found right. What does not fit is told.
    """
    lengths = None if contexts is None else read_lengths(contexts)
    crowds = _crowds(throughput)
    if int8 and eager:
        raise DataError(
            "--int8 is decoded by mmmamba's own decoder, not eagerly", "leave out one of the two"
        )
    counts = None if attn_layers is None else _counts(attn_layers)
    if random is not None and (model or product or teacher_path):
        raise DataError(
            "--random has its own teacher and students",
            "leave out --model, --from and --teacher-path",
        )
    if counts is not None and random is None:
        raise DataError("--attn-layers needs --random NAME", "hybridize makes a run's hybrids")

    from mmmamba_cli.profiling import (
        check_replaceable,
        default_plan,
        int8_subjects,
        random_subjects,
        weight_store,
        write_profile,
    )

    own = random is None and (not model or bool(product))
    target = folder or (run / FOLDER if own else Path(FOLDER))
    check_replaceable(target)
    store = weight_store(device, dtype)
    if random is not None:
        subjects = random_subjects(
            store, random, counts, teacher=teacher is not False, seed=seed, eager=eager
        )
    else:
        subjects = _subjects(store, run, product or (), teacher, teacher_path, model or (), eager)
    if int8:
        subjects = [*subjects, *int8_subjects(subjects)]
    default = default_plan(store.device)
    plan = replace(
        default,
        contexts=lengths or default.contexts,
        batch=batch,
        repeats=repeats or default.repeats,
        prefill=prefill,
        prefill_contexts=None if lengths else default.prefill_contexts,
        throughput=default.throughput if crowds is None else crowds,
        prefill_chunk=prefill_chunk,
        budget=budget or default.budget,
        seed=seed,
    )
    with if_interrupted(
        f"nothing was written to {target}: a profile is written once all is measured; a smaller "
        "one has fewer --contexts or a --budget"
    ):
        found = _profile(subjects, plan)
    files = write_profile(found, target)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _say(found)
    _say_files(files)


def _crowds(text: str | None) -> tuple[int, ...] | None:
    """Contexts for throughput; None where the device's own are meant."""
    if text is None:
        return None
    return () if text.strip() == "0" else read_lengths(text, "--throughput")


def _counts(text: str) -> tuple[int, ...]:
    words = [part.strip() for part in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise DataError(
            f"--attn-layers is {text!r}, expected numbers of layers", "as in --attn-layers 0,4,8"
        )
    return tuple(int(word) for word in words)


def _subjects(
    store: WeightStore,
    run: Path,
    products: Sequence[str],
    teacher: bool | None,
    teacher_path: Path | None,
    models: Sequence[Path],
    eager: bool,
) -> list[Subject]:
    """Of a run, of paths, or of both where both are named."""
    from mmmamba_cli.profiling import path_subjects, run_subjects
    from mmmamba_cli.profiling.subjects import run_teacher

    moved = teacher_path is not None
    found: list[Subject] = []
    if not models or products:
        wanted = True if moved else False if models and teacher is None else teacher
        found = run_subjects(
            store, run, products, teacher=wanted, teacher_path=teacher_path, eager=eager
        )
    elif teacher or moved:
        found = run_teacher(store, run, teacher_path, eager=eager)
    return [*found, *path_subjects(store, models, eager=eager)]


def _profile(subjects: Sequence[Subject], plan: Plan) -> Profile:
    from mmmamba_cli.profiling import Watch, profile

    def say(text: str) -> None:
        err().print(text, markup=False, highlight=False, soft_wrap=True)

    prompts = len(plan.prefill_contexts or plan.contexts) if plan.prefill else 0
    turns = plan.turns * (len(plan.contexts) + prompts) * len(subjects)
    with progress("profiling", turns, "turns") as advance:
        return profile(subjects, plan, watch=Watch(say=say, advance=advance))


def _say(found: Profile) -> None:
    from mmmamba_cli.profiling import report

    for title, heading, rows in report.tables(found):
        print_table(heading, rows, title=title, right=heading)
        out().print()
    lines = [f"Compared: {found.compared}.", report.gate_line(found)]
    lines += [f"{line}." for line in report.host_lines(found)]
    for line in (*lines, *(f"Note: {note}." for note in found.notes)):
        out().print(line, markup=False, highlight=False, soft_wrap=True)
    for remark in report.remarks(found):
        print_warning(remark)


def _say_files(files: Sequence[Path]) -> None:
    from mmmamba_cli.profiling.plot import PIP
    from mmmamba_cli.profiling.result import PICTURE

    for file in files:
        err().print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    if not any(file.name == PICTURE for file in files):
        print_warning(f"no {PICTURE}: it is drawn with matplotlib; {PIP}")
