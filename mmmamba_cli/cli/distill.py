"""`mmmamba distill`: steps 2 to 4, the stages of the recipe."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmmamba_cli.cli.console import (
    plain_warnings,
    print_json,
    print_line,
    print_text,
    progress,
)
from mmmamba_cli.cli.next_steps import GivenOptions, steps_after
from mmmamba_cli.cli.options import (
    DEFAULT_RUN,
    AsJson,
    Device,
    FromParent,
    RunFolder,
    Sets,
    TeacherPath,
    complete_recipes,
)
from mmmamba_cli.cli.quiet_timer import import_notes
from mmmamba_cli.errors import MmmambaError

if TYPE_CHECKING:
    from mmmamba_cli.hybridize import LayerSelection
    from mmmamba_cli.recipe import Recipe
    from mmmamba_cli.runs import Manifest, Run

INTERRUPTED = 130


class Parallel(StrEnum):
    AUTO = "auto"
    REPLICATE = "replicate"
    SHARD = "shard"


def command(
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE,...",
            help="Stages to run, by name or number (default: all remaining stages).",
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
            help="Recipe to use instead of the product's.",
            autocompletion=complete_recipes,
        ),
    ] = None,
    sets: Sets = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Training conversations: a file, or a generated corpus such as scenes:lessons "
            "(data.train).",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Held-out conversations (data.held_out)."),
    ] = None,
    image_root: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of all images, including held-out ones (data.image_root; default: the one "
            "in the recipe of the start product, else the folder of each data file).",
        ),
    ] = None,
    teacher: TeacherPath = None,
    device: Device = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Train on N GPUs of this machine, with one process each; with --device cpu, with "
            "N processes on the CPU (default: 1).",
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="With --gpus, start the processes again from the last state if one is killed, at "
            "most N times.",
        ),
    ] = 0,
    parallel: Annotated[
        Parallel,
        typer.Option(
            metavar="MODE",
            help="What each of several processes holds of trainable parameters, gradients and "
            "moments: replicate (everything), shard (a share), or auto (everything if it fits into "
            "half of the free memory). A run can resume in another mode.",
        ),
    ] = Parallel.AUTO,
    force: Annotated[
        bool, typer.Option("--force", help="Resume although settings or data have changed.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Repeat finished stages. If interrupted, run the same command to resume; the old "
            "product stays until the new one is complete.",
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="Begin each stage at step 1, ignoring existing products and states."
        ),
    ] = False,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing and write nothing: print what learns, memory, time, disk, and the "
            "first batch as text.",
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="With --dry-run, load both models and time a step of each stage."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the student to imitate its teacher, stage by stage.

    Runs the stages of the recipe, or some of them. Resumes where it stopped. Ctrl-C saves and
    stops; a second one stops at once. For several machines start it under torchrun: torchrun ... -m
    mmmamba_cli -- distill ...
    """
    from mmmamba_cli.distributed.launcher import count_processes

    processes = count_processes(gpus, device)
    _check_restarts(max_restarts, processes, restart)
    job = DistillCommand(
        run=run,
        stage=stage,
        parent=parent,
        recipe=recipe,
        sets=tuple(sets or ()),
        given={"data.train": data, "data.held_out": held_out, "data.image_root": image_root},
        teacher=teacher,
        device=device,
        parallel=parallel.value,
        overwrite=overwrite,
        force=force,
        restart=restart,
        launched=processes > 1,
    )
    if dry or measure:
        _dry_run(job, processes, dry, measure, as_json)
        return
    made = _launch(job, processes, max_restarts) if processes > 1 else train(job)
    if made is None:
        raise typer.Exit(INTERRUPTED)
    if made:
        from mmmamba_cli.runs import Run

        _print_products(Run(run), made, GivenOptions(teacher, device), as_json)


def _dry_run(job: DistillCommand, processes: int, dry: bool, measure: bool, as_json: bool) -> None:
    """Print what the stages need. The run is not locked: nothing is written."""
    from mmmamba_cli.cli.dry_run_display import print_dry_run
    from mmmamba_cli.devices import pick_device
    from mmmamba_cli.distill import DryRunOptions, dry_run, parse_stage_names
    from mmmamba_cli.runs import Run

    if not dry:
        raise MmmambaError("--measure is an option of --dry-run", "give both, or neither")
    if measure and processes > 1:
        raise MmmambaError(
            f"--measure times a step in one process, and --gpus is {processes}",
            "leave out one of the two",
        )
    run = Run(job.run)
    recipe = _recipe(run, job)
    options = DryRunOptions(
        wanted=parse_stage_names(recipe, job.stage),
        start=job.parent,
        teacher=job.teacher,
        processes=processes,
        measure=measure,
        require_packed=job.sets_batching,
    )
    report = dry_run(
        run, recipe, pick_device(job.device), options, lambda text: print_line(text, to_stderr=True)
    )
    if as_json:
        print_json(report.as_dict())
    else:
        print_dry_run(report)


def _check_restarts(max_restarts: int, processes: int, restart: bool) -> None:
    if not max_restarts:
        return
    if processes == 1:
        raise MmmambaError(
            f"--max-restarts {max_restarts}: a single process cannot start itself again",
            "give --gpus 2 or more, or leave it out",
        )
    if restart:
        raise MmmambaError(
            "--max-restarts goes on from the last state, and --restart begins at step 1",
            "give --overwrite in place of --restart",
        )


def _launch(job: DistillCommand, processes: int, max_restarts: int) -> list[Manifest] | None:
    """Train in several processes, and again from the last state if one of them is killed."""
    from mmmamba_cli.distributed.launcher import launch
    from mmmamba_cli.distributed.process_failures import ProcessKilled

    print_line(f"starting {processes} processes", to_stderr=True)
    restarts = 0
    while True:
        try:
            return launch(train_share, job, processes)
        except ProcessKilled as killed:
            if restarts == max_restarts:
                raise
            restarts += 1
            print_line(
                f"{killed.message}; starting again from the last state, {restarts} of "
                f"{max_restarts}",
                to_stderr=True,
            )


@dataclass(frozen=True)
class DistillCommand:
    """The arguments of the command, for each process."""

    run: Path
    stage: str | None
    parent: str | None
    recipe: str | None
    sets: tuple[str, ...]
    given: dict[str, str | None]
    teacher: Path | None
    device: str | None
    parallel: str
    overwrite: bool
    force: bool
    restart: bool
    # Whether a launcher started this process, which then prints messages about signals.
    launched: bool

    @property
    def sets_batching(self) -> bool:
        """Whether `--set` names data.batching: what a user asks for is not replaced."""
        return any(one.partition("=")[0].strip() == "data.batching" for one in self.sets)


def train_share(job: DistillCommand) -> list[Manifest] | None:
    """`train` in a process of `--gpus`, with notes about its imports."""
    with import_notes():
        return train(job)


def train(job: DistillCommand) -> list[Manifest] | None:
    """Train in this process or as one of several; products on process 0, None if stopped."""
    from mmmamba_cli.cli import escape_unencodable_output
    from mmmamba_cli.cli.distill_display import TrainingDisplay
    from mmmamba_cli.cli.stop_request import StopRequest
    from mmmamba_cli.distill import DistillOptions, Stopped, distill, parse_stage_names
    from mmmamba_cli.distributed import join_world
    from mmmamba_cli.runs import Run

    target = Run(job.run)
    with ExitStack() as stack:
        if job.launched:
            # The launcher did this for itself only.
            escape_unencodable_output()
            stack.enter_context(plain_warnings())
        world = stack.enter_context(join_world(job.device))
        world.run_on_main(lambda: _take_lock(stack, target))
        plan = world.run_on_main(lambda: _recipe(target, job))
        wanted = world.run_on_main(lambda: parse_stage_names(plan, job.stage))
        if not world.is_main:
            # Every process would print the same warnings.
            stack.enter_context(warnings.catch_warnings(action="ignore"))
        stop = stack.enter_context(StopRequest(prints=world.is_main and not job.launched))
        display = stack.enter_context(TrainingDisplay(world.is_main, stop))
        try:
            made = distill(
                target,
                plan,
                world,
                display.callbacks,
                wanted=wanted,
                start=job.parent,
                options=DistillOptions(
                    teacher=job.teacher,
                    overwrite=job.overwrite,
                    force=job.force,
                    restart=job.restart,
                    parallel=job.parallel,
                    require_packed=job.sets_batching,
                ),
                select=partial(_select_layers, job),
            )
        except Stopped:
            display.say("stopped and saved; run the same command to resume")
            return None
    return made if world.is_main else []


def _select_layers(
    job: DistillCommand, run: Run, recipe: Recipe, product: Manifest
) -> LayerSelection:
    """The attention layers of a recipe with `layers.select`, as `hybridize` chooses them."""
    from mmmamba_cli.layer_selection import SelectionCallbacks, select_planned_layers

    callbacks = SelectionCallbacks(
        say=lambda text: print_line(text, to_stderr=True),
        progress=lambda title, total: progress(title, total, "layers"),
    )
    return select_planned_layers(
        run, recipe, product, callbacks, device=job.device, teacher=job.teacher
    )


def _take_lock(stack: ExitStack, run: Run) -> None:
    stack.enter_context(run.lock_existing())


def _recipe(run: Run, job: DistillCommand) -> Recipe:
    """The recipe of `--recipe`, or of the start product, with the overrides of the command."""
    from mmmamba_cli.recipe import load_recipe, parse_recipe

    overrides: dict[str, Any] = {k: v for k, v in job.given.items() if v is not None}
    if job.recipe is not None:
        return load_recipe(job.recipe, job.sets, overrides)
    product = run.product(job.parent or run.record.current)
    return parse_recipe(product.recipe, f"recipe of {product.name}", job.sets, overrides)


def _print_products(run: Run, made: list[Manifest], given: GivenOptions, as_json: bool) -> None:
    from mmmamba_cli.distill import LOSS_PLOT

    if as_json:
        products = [product.model_dump(mode="json") for product in made]
        print_json({"run": str(run.folder), "products": products})
        return
    for product in made:
        folder = run.product_folder(product.name)
        print_text(f"{product.name}: {product.kind}, {folder}")
        if (folder / LOSS_PLOT).is_file():
            print_text(f"  losses: {folder / LOSS_PLOT}")
    steps_after(run, made[-1], given).print()
