"""`mmmamba data`: validation of training data, and their index."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import help_if_bare, print_json, print_line, print_table, progress
from mmmamba_cli.cli.next_steps import NextSteps, command_line
from mmmamba_cli.cli.options import DEFAULT_RUN, AsJson, RunFolder

if TYPE_CHECKING:
    from mmmamba_cli.data import DataReport
    from mmmamba_cli.processing import TeacherProcessor, TrainingProcessor
    from mmmamba_cli.runs import Run

MAX_BAD_SHARE = 0.01
PROBLEMS = 2
# Longer than any sample.
UNLIMITED_TOKENS = 1 << 62

command = typer.Typer(help="Check and index training data.", invoke_without_command=True)
command.callback()(help_if_bare)


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Conversations .jsonl or .json, an InternVL meta .json, .tar shards, .parquet "
        "files or a folder of tables, or a generated corpus such as scenes:lessons.",
    ),
]
ImageRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder that image paths are relative to (default: the folder of the data).",
    ),
]
ModelPath = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Model whose tokenizer to use instead of the run's."),
]
MaxTiles = Annotated[
    int | None,
    typer.Option(metavar="N", help="Maximum tiles per image (default: the model's).", min=1),
]


@command.command()
def check(
    source: Source,
    image_root: ImageRoot = None,
    run: RunFolder = DEFAULT_RUN,
    model: ModelPath = None,
    max_length: Annotated[
        int, typer.Option(metavar="N", help="Maximum sequence length in tokens.", min=2)
    ] = 8192,
    max_tiles: MaxTiles = None,
    max_bad_share: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Highest share of bad samples that passes.", min=0, max=1
        ),
    ] = MAX_BAD_SHARE,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Check only the first N samples (default: all; 1,000 of an endless corpus).",
            min=1,
        ),
    ] = None,
    decode: Annotated[
        bool,
        typer.Option("--decode/--headers-only", help="Decode every picture, or read headers only."),
    ] = True,
    every: Annotated[
        bool, typer.Option("--all", help="List every bad sample, not only the first ten.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Report lengths, images and problems of training data.

    The data are read as training reads them. Exit code 2 if more samples are bad than
    --max-bad-share allows.
    """
    from mmmamba_cli.data import (
        MAX_NAMED,
        can_be_packed,
        check_data,
        find_index,
        open_corpus,
        samples_to_check,
    )
    from mmmamba_cli.runs import Run

    corpus = open_corpus(source, image_root)
    processor = _processor(run, model)
    total = min(len(corpus), limit or samples_to_check(corpus))
    with progress("checking", total, "samples") as advance:
        report = check_data(
            corpus,
            processor,
            max_length,
            max_tiles,
            limit=limit,
            decode=decode,
            advance=advance,
        )
    named = None if every else MAX_NAMED
    packs = can_be_packed(processor)
    found = find_index(source, corpus, processor, max_tiles)
    if as_json:
        file = None if found.file is None else str(found.file)
        print_json({**report.as_dict(named), "can_be_packed": packs, "index": file})
    else:
        _print_report(report, max_length, named)
        if not packs:
            print_line("rows of this model are bucketed by length or padded, and cannot be packed")
        for line in (f"data index: {found.file}",) if found.file else found.stale:
            print_line(line)
    if report.bad_share > max_bad_share:
        raise typer.Exit(PROBLEMS)
    if not as_json:
        _steps_after_check(Run(run), source, image_root, model).print()


@command.command()
def index(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Conversations .jsonl or .json, an InternVL meta .json, .tar shards, .parquet "
            "files or a folder of tables.",
        ),
    ],
    image_root: ImageRoot = None,
    run: RunFolder = DEFAULT_RUN,
    model: ModelPath = None,
    max_tiles: MaxTiles = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes that count tokens (default: one for each CPU core).",
            min=0,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Build the index again, for example after replacing pictures."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Count the tokens of every sample once, so that training need not.

    The index is a file beside the data, or in the cache folder if that cannot be written. It is
    valid for every maximum length and batch size. `mmmamba distill` finds and uses it: each of its
    processes then prepares only its share of a batch.
    """
    from mmmamba_cli.checkpoint import atomic_write_bytes
    from mmmamba_cli.data import build_index, index_file, index_key, open_corpus, open_index

    corpus = open_corpus(source, image_root)
    processor = _processor(run, model)
    key = index_key(corpus, processor, max_tiles)
    file = index_file(source, key)
    found = None if overwrite else open_index(file, key)
    is_new = found is None
    if found is None:
        count = _num_cores() if workers is None else workers
        with progress("counting tokens", len(corpus), "samples") as advance:
            found = build_index(corpus, processor, key, workers=count, advance=advance)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(file, found.to_bytes())
    totals = found.summary(UNLIMITED_TOKENS)
    if as_json:
        print_json({"file": str(file), "built": is_new} | asdict(totals))
        return
    print_line(f"{file}{'' if is_new else ' is already there'}")
    print_table(
        ("", "count"),
        [
            ("samples", f"{totals.samples:,}"),
            ("images", f"{totals.images:,}"),
            *([("tiles", f"{totals.tiles:,}")] if totals.tiles else []),
            ("tokens", f"{totals.tokens:,}"),
            ("tokens of the longest sample", f"{totals.longest:,}"),
            ("bad samples", f"{totals.bad:,}"),
        ],
        right=("count",),
    )


def _num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor(run: Path, model: Path | None) -> TrainingProcessor | TeacherProcessor:
    from mmmamba_cli.checkpoint import open_any_checkpoint
    from mmmamba_cli.errors import CheckpointError
    from mmmamba_cli.runs import Run, open_training_processor

    if model is not None:
        checkpoint = open_any_checkpoint(model)
    else:
        target = Run(run)
        checkpoint = target.open_any_product(target.record.current)
    processor = open_training_processor(checkpoint)
    if processor is None:
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer", "name a model that has one with --model"
        )
    return processor


def _steps_after_check(
    run: Run, source: str, image_root: Path | None, model: Path | None
) -> NextSteps:
    """Training on checked data; the seed of a run comes first where there is none."""
    data: list[str | Path] = ["--data", source]
    data += [] if image_root is None else ["--image-root", image_root]
    train = command_line("distill", *data, run=run.folder)
    if run.exists:
        return NextSteps((train,))
    if model is not None:
        return NextSteps((command_line("seed", model, run=run.folder), train))
    remark = "TEACHER: a folder or a Hub id, as `mmmamba verify TEACHER` checks it"
    return NextSteps((command_line("seed", "TEACHER", run=run.folder), train), (remark,))


def _print_report(report: DataReport, max_length: int, named: int | None) -> None:
    found = report.as_dict(named)
    length = found["length"]
    rows = [
        ("samples", f"{report.samples:,}"),
        ("  with images", f"{report.with_images:,}"),
        ("images", f"{report.images:,}"),
        *([("tiles", f"{report.tiles:,}")] if report.tiles else []),
        ("tokens", f"{report.tokens:,}"),
        ("  of answers", f"{report.answer_tokens:,}"),
        ("tokens per sample, least", length["min"]),
        ("  median", length["median"]),
        ("  95 %", length["p95"]),
        ("  most", length["max"]),
        (f"cut to {max_length} tokens", f"{report.cut:,} ({report.cut_share:.2%})"),
        ("bad samples", f"{len(report.bad):,} ({report.bad_share:.2%})"),
    ]
    if report.empty_answers:
        rows.append(("samples with an empty answer", f"{report.empty_answers:,}"))
    if report.without_answer:
        rows.append(("samples without an answer after the cut", f"{report.without_answer:,}"))
    if report.ignored:
        rows.append(("members of no sample", f"{len(report.ignored):,}"))
    print_table(("", "count"), rows, right=("count",))
    if report.bad:
        print_table(("samples", "problem"), [(n, reason) for reason, n in report.reasons().items()])
        print_table(("sample", "what is wrong"), [(b["name"], b["reason"]) for b in found["named"]])
        _print_rest(found["unnamed"], "bad samples")
    if report.ignored:
        print_table(("members of no sample",), [(name,) for name in found["ignored_names"]])
        _print_rest(len(report.ignored) - len(found["ignored_names"]), "members")


def _print_rest(count: int, things: str) -> None:
    if count:
        print_line(f"and {count:,} more {things}; --all names every one")
