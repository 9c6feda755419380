"""`mmmamba export`: a model in another layout, for other tools or for the Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import if_interrupted, print_json, print_text, print_warning, progress
from mmmamba_cli.cli.options import DEFAULT_RUN, AsJson, FromCurrent, Overwrite, RunFolder
from mmmamba_cli.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmmamba_cli.checkpoint import Checkpoint
    from mmmamba_cli.evaluate.result import Result, RulePart
    from mmmamba_cli.export import CardInfo, CardScore, ExportResult
    from mmmamba_cli.runs import Manifest, Run

EVALS = "evals"


def command(
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="hub: loads with transformers where mmmamba is not installed; mmmamba-hf: the "
            "layout mmMamba was published in; hovle: HoVLE's, for models that are all attention.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    run: RunFolder = DEFAULT_RUN,
    product: FromCurrent = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Any checkpoint, in the run's place; or OWNER/NAME."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="bf16, fp16 or fp32; what is stored if not given."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="NAME", help="The model card's licence; none if not."),
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="TITLE", help="The model card's title.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="OWNER/NAME",
            help="The teacher's name on the Hub, for the card; else what its folder is known by.",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the folder to this repository."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a pushed repository private.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in another layout, with a model card; all of it or nothing."""
    from mmmamba_cli.checkpoint import open_checkpoint, parse_dtype
    from mmmamba_cli.export import (
        CardInfo,
        check_repository_id,
        export_checkpoint,
        make_layout,
        planned_tensors,
    )
    from mmmamba_cli.runs import Run
    from mmmamba_cli.runs.provenance import find_manifest

    if model is not None and product is not None:
        raise RunError("--from and --model exclude each other", "give one of them")
    if push is not None:
        check_repository_id(push)
    if model is not None:
        checkpoint = open_checkpoint(model)
        info = CardInfo(find_manifest(checkpoint), licence=licence, title=title, base=base)
    else:
        target = Run(run)
        name = product or target.record.current
        manifest = target.product(name)
        info = CardInfo(
            manifest=manifest,
            lineage=tuple(reversed(list(_ancestors(target, manifest)))),
            scores=tuple(_scores(target, manifest)),
            licence=licence,
            title=title,
            base=base,
        )
        checkpoint = target.open_product(name)
    wanted = None if dtype is None else parse_dtype(dtype)
    size = sum(
        info.nbytes for info in planned_tensors(make_layout(checkpoint, form, wanted)).values()
    )
    with (
        if_interrupted(f"nothing was written to {out}; repeat the command"),
        progress("exporting", size, "B") as advance,
    ):
        found = export_checkpoint(
            checkpoint, form, out, info=info, dtype=wanted, overwrite=overwrite, advance=advance
        )
    _warn(checkpoint, info)
    with if_interrupted(
        f"the export in {out} is complete, its upload may not be; repeat it with --overwrite"
    ):
        address = _push(out, push, private)
    _say(found, address, as_json)


def _ancestors(run: Run, manifest: Manifest) -> Iterator[Manifest]:
    """Products this one was made from, the nearest first, as long as they are what they were."""
    products = run.products()
    # A product that was made anew from its own descendant is among its ancestors.
    seen = {manifest.name}
    while True:
        above = next((p for p in manifest.parents if p.role == "student"), None)
        if above is None or above.name not in products or above.name in seen:
            return
        seen.add(above.name)
        manifest = products[above.name]
        if manifest.content_hash != above.content_hash:
            return
        yield manifest


def _scores(run: Run, manifest: Manifest) -> Iterator[CardScore]:
    """What `mmmamba eval` has found of just this product, its teacher's scores beside."""
    from mmmamba_cli.evaluate.result import find_results
    from mmmamba_cli.export import CardScore

    evaluated = find_results(run.folder / EVALS)
    for sentence in evaluated.left_out:
        print_warning(f"{sentence}: the card has none of it")
    teacher = run.record.teacher
    taught = [
        result
        for result in evaluated.results.values()
        if teacher is not None and result.model.content_hash == teacher.content_hash
    ]
    for result in evaluated.results.values():
        if result.model.content_hash != manifest.content_hash:
            continue
        for part in result.rules:
            value = part.metrics[part.metric]
            low, high = part.intervals.get(part.metric, (None, None))
            if value is None:
                continue
            yield CardScore(
                suite=result.title,
                rule=part.rule,
                metric=part.metric,
                value=value,
                rows=result.data.used,
                low=low,
                high=high,
                level=result.level,
                partial=result.data.partial,
                teacher=_of_teacher(taught, result, part),
            )


def _of_teacher(taught: Sequence[Result], result: Result, part: RulePart) -> float | None:
    """The teacher's number by the same rule for the same questions, if it was asked them."""
    for one in taught:
        theirs = one.rule(part.rule)
        same = one.suite == result.suite and one.data.same_questions(result.data)
        if same and theirs is not None:
            return theirs.metrics.get(part.metric)
    return None


def _warn(checkpoint: Checkpoint, info: CardInfo) -> None:
    if checkpoint.tokenizer_file is None:
        print_warning(f"{checkpoint.path} has no tokenizer: the export has none either")
    if info.manifest is not None and info.manifest.final is False:
        print_warning(f"{info.manifest.name} was never distilled end to end; its card says so")


def _push(folder: Path, repository: str | None, private: bool) -> str | None:
    from mmmamba_cli.export import push_to_hub

    return None if repository is None else push_to_hub(folder, repository, private=private)


def _say(found: ExportResult, address: str | None, as_json: bool) -> None:
    if as_json:
        print_json({**asdict(found), "folder": str(found.folder), "pushed": address})
        return
    print_text(
        f"{found.tensors} tensors, {found.nbytes / 1e9:.2f} GB in {found.dtype}, as "
        f"{found.format}: {found.folder}"
    )
    if address is not None:
        print_text(f"pushed to {address}")
