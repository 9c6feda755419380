"""`mmmamba verify`: compare a teacher with its stock class before anything is made from it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import (
    print_error,
    print_json,
    print_line,
    print_table,
    print_text,
    print_warning,
    progress,
)
from mmmamba_cli.cli.options import AsJson, Device

if TYPE_CHECKING:
    from mmmamba_cli.verification import VerificationReport

PROBLEMS = 2


def command(
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER", help="Folder of a teacher, a shipped model, or a Hub id OWNER/NAME."
        ),
    ],
    device: Device = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="bf16, fp16, fp32, or auto: bf16 on CUDA except for HoVLE, else fp32.",
        ),
    ] = "auto",
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Tokens to generate in comparisons.", min=1)
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """Check a teacher before anything is made from it.

    Run it first on real weights. Tensors, tokenizer, chat template and processor are checked, then
    logits and generation of students of these weights against the stock class of transformers, on
    text and drawn pictures, each mixer in one layer, and memory. Nothing is written. Exit code 0 if
    everything agrees, else 2.
    """
    from mmmamba_cli.verification import verify_teacher

    with progress("verifying"):
        report = verify_teacher(
            teacher, device=device, dtype=dtype, tokens=tokens, progress=_print_status
        )
    if as_json:
        print_json({"agrees": report.agrees, **asdict(report)})
    else:
        _print_report(report)
    if not report.agrees:
        raise typer.Exit(PROBLEMS)


def _print_status(text: str) -> None:
    print_line(f"checking {text}", style="dim", to_stderr=True)


def _print_report(report: VerificationReport) -> None:
    from mmmamba_cli.verification import DIFFERENT, SKIPPED

    print_table(
        ("check", "result", "detail"),
        [(check.name, check.status, check.detail) for check in report.checks],
        title=f"{report.teacher}, {report.model_type}, in {report.dtype} on {report.device}",
    )
    print_text()
    if report.compared_with is None:
        print_line("compared with itself only: there is no other implementation of it here")
    else:
        print_line(f"compared with {report.compared_with}")
    left_out = [check.name for check in report.with_status(SKIPPED)]
    if left_out:
        print_line(f"not checked: {'; '.join(left_out)}")
    for sentence in report.warnings:
        print_warning(sentence)
    for check in report.with_status(DIFFERENT):
        print_error(check.sentence)
    if report.agrees:
        print_line("agrees: no check found a difference")
