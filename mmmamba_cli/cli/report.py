"""`mmmamba report`: a run as one HTML file."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from mmmamba_cli.cli.console import print_json, print_text, print_warning
from mmmamba_cli.cli.options import DEFAULT_RUN, AsJson, RunFolder

FILE = "report.html"


def command(
    run: RunFolder = DEFAULT_RUN,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Another run to compare with, named by its folder. May be repeated.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with the suites' TSV files, for the images."),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results",
            metavar="FILE",
            help="Results to show first, instead of the run's own: the JSON of "
            "`mmmamba eval --teacher --json`, or profile.json of `mmmamba profile`. May be "
            "repeated.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TITLE", help="Heading of the page.")] = None,
    note: Annotated[
        str | None,
        typer.Option(metavar="SENTENCE", help="A sentence below the heading."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="HTML file to write (default: report.html of the run)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run as one HTML page: retention, costs, answers.

    Training curves, scores, lineage and commands follow. The file is self-contained. Parts without
    results are left out and listed.
    """
    from mmmamba_cli.checkpoint import atomic_write_text
    from mmmamba_cli.reporting import build_page, check_replaceable, read_report_data

    place = file or run / FILE
    check_replaceable(place)
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    found = read_report_data(run, beside or (), results or ())
    page = build_page(found, created=created, title=title, note=note, data=data)
    place.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(place, page.html)
    if as_json:
        shown = {"shown": list(page.shown), "left_out": page.left_out}
        print_json({"file": str(place), **shown, "summary": list(page.summary)})
        return
    for what, reason in page.left_out.items():
        print_warning(f"no {what}: {reason}")
    for sentence in page.summary:
        print_text(sentence)
    print_text(f"{place}: {', '.join(page.shown)}")
