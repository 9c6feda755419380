"""`mmmamba data`: validation of training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import help_if_bare, print_json, print_line, print_table, progress
from mmmamba_cli.cli.options import DEFAULT_RUN, AsJson, RunFolder

if TYPE_CHECKING:
    from mmmamba_cli.data import DataReport
    from mmmamba_cli.processing import TeacherProcessor, TrainingProcessor

MAX_BAD_SHARE = 0.01
PROBLEMS = 2

command = typer.Typer(help="Check training data.", invoke_without_command=True)
command.callback()(help_if_bare)


@command.command()
def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Conversations .jsonl or .json, an InternVL meta .json, .tar shards, .parquet "
            "files or a folder of tables, or a generated corpus such as scenes:lessons.",
        ),
    ],
    image_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that image paths are relative to (default: the folder of the data).",
        ),
    ] = None,
    run: RunFolder = DEFAULT_RUN,
    model: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Model whose tokenizer to use instead of the run's."),
    ] = None,
    max_length: Annotated[
        int, typer.Option(metavar="N", help="Maximum sequence length in tokens.", min=2)
    ] = 8192,
    max_tiles: Annotated[
        int | None,
        typer.Option(metavar="N", help="Maximum tiles per image (default: the model's).", min=1),
    ] = None,
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
        check_data,
        open_corpus,
        samples_to_check,
    )

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
    if as_json:
        print_json(report.as_dict(None if every else MAX_NAMED))
    else:
        _print_report(report, max_length, None if every else MAX_NAMED)
    if report.bad_share > max_bad_share:
        raise typer.Exit(PROBLEMS)


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
