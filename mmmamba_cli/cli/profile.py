"""`mmmamba profile`: time and memory over context lengths, compared with the teacher."""

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
    MAX_SEED,
    AsJson,
    Device,
    DType,
    Models,
    RunFolder,
    TeacherPath,
    check_output_folder,
    complete_products,
    read_lengths,
)
from mmmamba_cli.cli.quiet_timer import time_notes
from mmmamba_cli.errors import DataError

if TYPE_CHECKING:
    from mmmamba_cli.profiling import Plan, Profile, Subject

FOLDER = "profile"


def command(
    run: RunFolder = DEFAULT_RUN,
    product: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="PRODUCT",
            help="Product of the run (default: the newest of each layer plan). May be repeated.",
            autocompletion=complete_products,
        ),
    ] = None,
    teacher: Annotated[
        bool | None,
        typer.Option(
            "--teacher/--no-teacher",
            help="Also profile the teacher, as shipped and tuned (default without --model).",
        ),
    ] = None,
    teacher_path: TeacherPath = None,
    model: Models = None,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Profile an architecture with random weights, such as hovle-2.6b."
        ),
    ] = None,
    attn_layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="With --random: students with N attention layers (default: 0 and a quarter).",
        ),
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="With --random: students with each of these mixers in place of attention "
            "(default: the default mixer of recipes).",
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Context lengths, such as 512,8k,1m (default: by device)."
        ),
    ] = None,
    prefill: Annotated[
        bool,
        typer.Option("--prefill/--no-prefill", help="Also measure prefill."),
    ] = True,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Prefill chunk size in tokens (default: by model)."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also profile int8-quantized students.")
    ] = False,
    eager: Annotated[
        bool,
        typer.Option(
            "--eager",
            help="Decode students and the second teacher eagerly, with PyTorch's kernels.",
        ),
    ] = False,
    throughput: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Context lengths at which to search for the best batch size; 0 for none.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Batch size.")] = 1,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Timed repeats per model and context length."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="SECONDS", help="Time limit (default: 35 on a CPU, none on CUDA)."
        ),
    ] = None,
    device: Device = None,
    dtype: DType = "auto",
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=MAX_SEED, metavar="N", help="Seed of random weights, caches and tokens."
        ),
    ] = 0,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Output folder (default: profile/ of the run, or ./profile).",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure time, memory and throughput over context lengths.

    Prefill, decoding and, on a GPU, energy are measured. All models are checked for correctness
    first and then measured in turns in one run. A model or context that does not fit into memory is
    reported as such.
    """
    lengths = None if contexts is None else read_lengths(contexts)
    batch_contexts = _throughput_contexts(throughput)
    if int8 and eager:
        raise DataError(
            "--int8 is decoded by mmmamba's own decoder, not eagerly", "leave out one of the two"
        )
    counts = None if attn_layers is None else _read_counts(attn_layers)
    if random is not None and (model or product or teacher_path):
        raise DataError(
            "--random has its own teacher and students",
            "leave out --model, --from and --teacher-path",
        )
    if counts is not None and random is None:
        raise DataError("--attn-layers needs --random NAME", "hybridize makes a run's hybrids")
    if mixer is not None and random is None:
        raise DataError("--mixer needs --random NAME", "a recipe names the mixers of a run")
    mixers = None if mixer is None else [name.strip() for name in mixer.split(",")]

    from mmmamba_cli.profiling import (
        check_replaceable,
        default_plan,
        int8_subjects,
        random_subjects,
        select_subjects,
        weight_store,
        write_profile,
    )

    own = random is None and (not model or bool(product))
    target = folder or (run / FOLDER if own else Path(FOLDER))
    check_output_folder(target)
    check_replaceable(target)
    store = weight_store(device, dtype)
    if random is not None:
        subjects = random_subjects(
            store, random, counts, mixers, teacher=teacher is not False, seed=seed, eager=eager
        )
    else:
        subjects = select_subjects(
            store,
            run,
            product or (),
            model or (),
            teacher=teacher,
            teacher_path=teacher_path,
            eager=eager,
        )
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
        throughput=default.throughput if batch_contexts is None else batch_contexts,
        prefill_chunk=prefill_chunk,
        budget=budget or default.budget,
        seed=seed,
    )
    with if_interrupted(
        f"nothing was written to {target}: a profile is written once all is measured; a smaller "
        "one has fewer --contexts or a --budget"
    ):
        found = _profile(subjects, plan)
    with time_notes("drawing the plots"):
        files = write_profile(found, target)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _print_profile(found)
    _print_files(files)


def _throughput_contexts(text: str | None) -> tuple[int, ...] | None:
    """Contexts of the batch size search; None for the device's default."""
    if text is None:
        return None
    return () if text.strip() == "0" else read_lengths(text, "--throughput")


def _read_counts(text: str) -> tuple[int, ...]:
    words = [part.strip() for part in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise DataError(
            f"--attn-layers is {text!r}, expected numbers of layers", "as in --attn-layers 0,4,8"
        )
    return tuple(int(word) for word in words)


def _profile(subjects: Sequence[Subject], plan: Plan) -> Profile:
    from mmmamba_cli.profiling import ProfileProgress, profile

    def log(text: str) -> None:
        err().print(text, markup=False, highlight=False, soft_wrap=True)

    total = plan.num_measurements(len(subjects))
    with progress("profiling", total, "measurements") as advance:
        return profile(subjects, plan, progress=ProfileProgress(log=log, advance=advance))


def _print_profile(found: Profile) -> None:
    from mmmamba_cli.profiling import report

    for title, heading, rows in report.tables(found):
        print_table(heading, rows, title=title, right=heading)
        out().print()
    lines = [f"Compared: {found.compared}.", report.correctness_line(found)]
    lines += [f"{line}." for line in report.launch_overhead_lines(found)]
    for line in (*lines, *(f"Note: {note}." for note in found.notes)):
        out().print(line, markup=False, highlight=False, soft_wrap=True)
    for remark in report.remarks(found):
        print_warning(remark)


def _print_files(files: Sequence[Path]) -> None:
    from mmmamba_cli.profiling.plot import MATPLOTLIB_INSTALL
    from mmmamba_cli.profiling.result import PNG_FILE

    for file in files:
        err().print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
    if not any(file.name == PNG_FILE for file in files):
        print_warning(f"no {PNG_FILE}: it is drawn with matplotlib; {MATPLOTLIB_INSTALL}")
