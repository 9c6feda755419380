"""`mmmamba export`: write a model in another layout, for other tools or the Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import if_interrupted, print_json, print_text, print_warning, progress
from mmmamba_cli.cli.next_steps import NextSteps, command_line
from mmmamba_cli.cli.options import DEFAULT_RUN, AsJson, FromCurrent, Overwrite, RunFolder
from mmmamba_cli.errors import RunError

if TYPE_CHECKING:
    from mmmamba_cli.checkpoint import AnyCheckpoint
    from mmmamba_cli.export import CardInfo, ExportResult


def command(
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="hub: loads with transformers without mmmamba; mmmamba-hf: the layout of the "
            "published mmMamba; hovle: HoVLE's layout, for all-attention models.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")],
    run: RunFolder = DEFAULT_RUN,
    product: FromCurrent = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Checkpoint to export instead of a product; or OWNER/NAME."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="bf16, fp16 or fp32 (default: as stored)."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="NAME", help="License in the model card."),
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="TITLE", help="Title of the model card.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="OWNER/NAME",
            help="Hub name of the teacher, for the card (default: as its folder is known).",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the folder to this repository on the Hub."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the pushed repository private.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in a layout of other tools, with a model card.

    The folder is written completely or not at all.
    """
    from mmmamba_cli.checkpoint import open_any_checkpoint, parse_dtype
    from mmmamba_cli.checkpoint.model_names import check_repository_id
    from mmmamba_cli.export import (
        CardInfo,
        export_bytes,
        export_checkpoint,
        missing_files,
        push_to_hub,
        unchanged_ancestors,
    )
    from mmmamba_cli.inspection import card_scores
    from mmmamba_cli.runs import Run
    from mmmamba_cli.runs.provenance import find_manifest

    if model is not None and product is not None:
        raise RunError("--from and --model exclude each other", "give one of them")
    if push is not None:
        check_repository_id(push)
    if model is not None:
        checkpoint = open_any_checkpoint(model)
        card = CardInfo(find_manifest(checkpoint), licence=licence, title=title, base_model=base)
    else:
        target = Run(run)
        name = product or target.record.current
        manifest = target.product(name)
        scores, left_out = card_scores(target, manifest)
        for sentence in left_out:
            print_warning(f"{sentence}: the card has none of it")
        card = CardInfo(
            manifest=manifest,
            lineage=unchanged_ancestors(target, manifest),
            scores=scores,
            licence=licence,
            title=title,
            base_model=base,
        )
        checkpoint = target.open_any_product(name)
    wanted = None if dtype is None else parse_dtype(dtype)
    with (
        if_interrupted(f"nothing was written to {out}; repeat the command"),
        progress("exporting", export_bytes(checkpoint, form, wanted), "B") as advance,
    ):
        found = export_checkpoint(
            checkpoint, form, out, card=card, dtype=wanted, overwrite=overwrite, advance=advance
        )
    missing = missing_files(checkpoint)
    _print_warnings(checkpoint, missing, card)
    with if_interrupted(
        f"the export in {out} is complete, its upload may not be; repeat it with --overwrite"
    ):
        address = None if push is None else push_to_hub(out, push, private=private)
    _print_result(found, address, bool(missing), as_json)


def _print_warnings(checkpoint: AnyCheckpoint, missing: list[str], card: CardInfo) -> None:
    for name in missing:
        print_warning(f"{checkpoint.path} has no {name}: the export has none either")
    if card.manifest is not None and card.manifest.final is False:
        print_warning(f"{card.manifest.name} was never distilled end to end; its card says so")


def _print_result(found: ExportResult, address: str | None, is_silent: bool, as_json: bool) -> None:
    """Print what was written, and how to ask it; it `is_silent` without a tokenizer."""
    from mmmamba_cli.checkpoint.tensor_info import format_size

    if as_json:
        print_json({**asdict(found), "folder": str(found.folder), "pushed": address})
        return
    print_text(
        f"{found.tensors} tensors, {format_size(found.nbytes)} in {found.dtype}, as "
        f"{found.format}: {found.folder}"
    )
    if address is not None:
        print_text(f"pushed to {address}")
    if not is_silent:
        NextSteps((command_line("chat", "--model", found.folder),)).print()
