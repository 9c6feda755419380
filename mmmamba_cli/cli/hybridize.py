"""`mmmamba hybridize`: restore the teacher's attention in some layers of a student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmmamba_cli.cli.console import if_interrupted, print_json, print_text, progress
from mmmamba_cli.cli.next_steps import GivenOptions, steps_after
from mmmamba_cli.cli.options import DEFAULT_RUN, AsJson, FromParent, Overwrite, RunFolder
from mmmamba_cli.errors import RecipeError

if TYPE_CHECKING:
    from mmmamba_cli.runs import Manifest, Run


def command(
    attn_layers: Annotated[
        int | None, typer.Option("--attn-layers", metavar="N", help="Number of attention layers.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="I,J,...", help="Indices of the attention layers, from 0 through both stacks."
        ),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            metavar="PLACEMENT",
            help="Placement of N layers: head-interleaved (default), tail-interleaved, "
            "head-stacked or tail-stacked.",
        ),
    ] = None,
    run: RunFolder = DEFAULT_RUN,
    parent: FromParent = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Path of the teacher, if it has moved.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Restore the teacher's attention in some layers of a student.

    Starts from the run's stage-2 student if there is one, else from the current product. Without
    --attn-layers or --layers the layer plan of the run's recipe is used.
    """
    from mmmamba_cli.hybridize import choose_parent, hybridize, planned_product_name
    from mmmamba_cli.recipe import attention_layers, dump_recipe, parse_recipe
    from mmmamba_cli.runs import Run

    target = Run(run)
    with (
        if_interrupted(f"nothing was written to {run}; repeat the command"),
        target.lock_existing(),
    ):
        source = choose_parent(target, parent)
        plan = _plan(attn_layers, layers, placement)
        recipe = parse_recipe(source.recipe, f"recipe of {source.name}", (), plan)
        chosen = attention_layers(recipe.layers, source.num_layers)
        name = planned_product_name(recipe, chosen)
        size = _product_bytes(target, source)
        with progress("writing", size, "B") as advance:
            manifest = hybridize(
                target,
                source,
                chosen,
                name,
                teacher_path=teacher,
                overwrite=overwrite,
                recipe=dump_recipe(recipe),
                advance=advance,
            )
    _print_result(target, source, manifest, teacher, as_json)


def _plan(count: int | None, layers: str | None, placement: str | None) -> dict[str, Any]:
    """The options as recipe fields. Raises `RecipeError` for an invalid list of layers."""
    if count is not None and layers is not None:
        raise RecipeError("--attn-layers and --layers exclude each other", "give one of them")
    if layers is not None and placement is not None:
        raise RecipeError("--placement says where --attn-layers go", "leave it out with --layers")
    plan: dict[str, Any] = {} if placement is None else {"layers.placement": placement}
    if count is not None:
        plan["layers.attention"] = count
    if layers is not None:
        try:
            plan["layers.attention"] = [int(part) for part in layers.split(",") if part.strip()]
        except ValueError as error:
            raise RecipeError(
                f"--layers {layers!r} is no list of layers", "expected numbers such as 0,8,16"
            ) from error
    return plan


def _product_bytes(run: Run, source: Manifest) -> int:
    """Estimated bytes to write: the size of the parent."""
    folder = run.product_folder(source.name)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _print_result(
    run: Run, source: Manifest, manifest: Manifest, teacher: Path | None, as_json: bool
) -> None:
    folder = run.product_folder(manifest.name)
    if as_json:
        product = manifest.model_dump(mode="json")
        print_json({"run": str(run.folder), "product": product, "folder": str(folder)})
        return
    kept = ", ".join(map(str, manifest.attention_layers)) or "none"
    print_text(f"from {source.name}: attention in layers {kept} of {manifest.num_layers}")
    print_text(f"{manifest.kind}, not yet distilled end to end: {folder}")
    print_text("its layers are swapped, not trained")
    steps_after(run, manifest, GivenOptions(teacher)).print()
