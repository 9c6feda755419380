"""`mmmamba import`: add a student from elsewhere to a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import if_interrupted, print_json, print_text, print_warning, progress
from mmmamba_cli.cli.next_steps import GivenOptions, steps_after
from mmmamba_cli.cli.options import DEFAULT_RUN, AsJson, Overwrite, RunFolder

if TYPE_CHECKING:
    from mmmamba_cli.runs import Manifest, Run


def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A published mmMamba or a folder written by mmmamba: path or OWNER/NAME.",
        ),
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Teacher of the student; needed to train it further or change its layers.",
        ),
    ] = None,
    run: RunFolder = DEFAULT_RUN,
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the product.")] = "imported",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="bf16, fp16 or fp32 (default: the checkpoint's)."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add a student from elsewhere to a run.

    It becomes the current product.
    """
    from mmmamba_cli.checkpoint import open_checkpoint, parse_dtype
    from mmmamba_cli.runs import Run
    from mmmamba_cli.seed.import_student import import_student

    target = Run(run)
    student = open_checkpoint(checkpoint)
    source = None if teacher is None else open_checkpoint(teacher)
    size = sum(file.stat().st_size for file in student.source.files)
    with (
        if_interrupted(f"nothing was written to {run}; repeat the command"),
        target.lock(),
        progress("importing", size, "B") as advance,
    ):
        manifest = import_student(
            target,
            student,
            source,
            name=name,
            dtype=None if dtype is None else parse_dtype(dtype),
            overwrite=overwrite,
            advance=advance,
        )
    if student.tokenizer_file is None:
        print_warning(f"{student.path} has no tokenizer beside it: it cannot be asked anything")
    _print_result(target, manifest, teacher, as_json)


def _print_result(run: Run, manifest: Manifest, teacher: Path | None, as_json: bool) -> None:
    folder = run.product_folder(manifest.name)
    if as_json:
        product = manifest.model_dump(mode="json")
        print_json({"run": str(run.folder), "product": product, "folder": str(folder)})
        return
    print_text(f"{manifest.kind}, {manifest.progress}: {folder}")
    if run.record.teacher is None:
        print_text("without --teacher it can be asked, measured and exported, not trained further")
    steps_after(run, manifest, GivenOptions(teacher)).print()
