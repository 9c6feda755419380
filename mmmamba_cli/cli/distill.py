"""`mmmamba distill`: steps 2 to 4, the stages of the recipe."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmmamba_cli.cli.completing import complete_recipes
from mmmamba_cli.cli.console import print_json, print_text
from mmmamba_cli.cli.options import (
    DEFAULT_RUN,
    AsJson,
    Device,
    FromParent,
    Overwrite,
    RunFolder,
    Sets,
)

if TYPE_CHECKING:
    from mmmamba_cli.recipe import Recipe
    from mmmamba_cli.runs import Manifest, Run

INTERRUPTED = 130


def command(
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE,...",
            help="Stages to run, by name or number; all that are missing if not given.",
        ),
    ] = None,
    run: RunFolder = DEFAULT_RUN,
    parent: FromParent = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            # By name: typer 0.27.0 completes nothing for one it makes itself.
            "--recipe",
            metavar="RECIPE",
            help="Another recipe than the product's own.",
            autocompletion=complete_recipes,
        ),
    ] = None,
    sets: Sets = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Conversations to learn from (data.train)."),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Conversations to be measured on (data.held_out)."),
    ] = None,
    image_root: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the images (data.image_root); that of the data if not given.",
        ),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where the teacher is, if it has moved.")
    ] = None,
    device: Device = None,
    force: Annotated[
        bool, typer.Option("--force", help="Resume although settings have changed.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Distill the student: the stages of the recipe, or some of them.

    Goes on where it stopped. Ctrl-C saves and stops; a second one stops at once. Start it under
    torchrun for several GPUs: torchrun --nproc-per-node 8 -m mmmamba_cli distill ...
    """
    from mmmamba_cli.cli.training import StopRequest, TrainingDisplay
    from mmmamba_cli.distill import Options, Stopped, distill, wanted_stages
    from mmmamba_cli.distributed import join_world
    from mmmamba_cli.runs import Run

    given = {"data.train": data, "data.held_out": held_out, "data.image_root": image_root}
    target = Run(run)
    with join_world(device) as world, ExitStack() as stack:
        world.on_main(lambda: _take_lock(stack, target))
        plan = _recipe(target, parent, recipe, sets, given)
        stop = stack.enter_context(StopRequest())
        display = stack.enter_context(TrainingDisplay(world.is_main, stop))
        try:
            made = distill(
                target,
                plan,
                world,
                display.watch,
                wanted=wanted_stages(plan, stage),
                start=parent,
                options=Options(teacher, overwrite, force),
            )
        except Stopped:
            display.say("stopped and saved; the same command goes on from here")
            raise typer.Exit(INTERRUPTED) from None
    if world.is_main:
        _say(target, made, as_json)


def _take_lock(stack: ExitStack, run: Run) -> None:
    stack.enter_context(run.lock_existing())


def _recipe(
    run: Run,
    parent: str | None,
    name: str | None,
    sets: list[str] | None,
    given: dict[str, str | None],
) -> Recipe:
    """The recipe named, or that of the product to start from, with what was given laid over it."""
    from mmmamba_cli.recipe import load_recipe, parse_recipe

    overrides: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if name is not None:
        return load_recipe(name, sets or (), overrides)
    product = run.product(parent or run.record.current)
    return parse_recipe(product.recipe, f"recipe of {product.name}", sets or (), overrides)


def _say(run: Run, made: list[Manifest], as_json: bool) -> None:
    from mmmamba_cli.distill import PICTURE

    if as_json:
        products = [product.model_dump(mode="json") for product in made]
        print_json({"run": str(run.folder), "products": products})
        return
    for product in made:
        folder = run.product_folder(product.name)
        print_text(f"{product.name}: {product.kind}, {folder}")
        if (folder / PICTURE).is_file():
            print_text(f"  losses: {folder / PICTURE}")
    last = made[-1]
    what = "mmmamba eval --suite mme,pope" if last.final else "mmmamba distill"
    print_text(f"next: {what}")
