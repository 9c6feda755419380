"""One stage of a run, from its parent product to its own.

What to say when the device's memory is too small for a stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import Checkpoint, atomic_write_text, expected_tensors
from mmmamba_cli.data import StepLoader, open_corpus
from mmmamba_cli.distill.metrics import METRICS, MetricsLog, metrics_row, plot_losses, read_metrics
from mmmamba_cli.distill.optimiser import whole
from mmmamba_cli.distill.stage_attempt import OverwriteLog, Plan, Request, begin, make_plan
from mmmamba_cli.distill.stages import is_final, objective_of, stage_product
from mmmamba_cli.distill.teacher_student import load_pair
from mmmamba_cli.distill.trainable import adapted, attach, is_adapter, learning_names, updates
from mmmamba_cli.distill.trainer import Job, Report, StepResult, train
from mmmamba_cli.distill.training_state import BEST, Digests, Progress, StateFolder, settings_of
from mmmamba_cli.distributed import World, seed_everything, shard_mixers, step_seed
from mmmamba_cli.errors import CheckpointError, MmmambaError, RunError
from mmmamba_cli.recipe import Recipe, Stage, dump_recipe
from mmmamba_cli.runs import Draft, Manifest, Parent, Run, open_processor, write_product
from mmmamba_cli.runs.product import check_product_folder


def out_of_memory(
    stage: Stage, recipe: Recipe, progress: Progress, error: Exception
) -> MmmambaError:
    """An error that names the three settings that would help most, with values to try."""
    length = stage.max_length or recipe.data.max_length
    name = f"stages.{stage.name}"
    remedies = []
    parts = _next_divisor(stage.batch_size, stage.accumulation)
    if parts is not None:
        remedies.append(f"--set {name}.accumulation={parts}")
    if stage.precision != "bf16":
        remedies.append(f"--set {name}.precision=bf16")
    remedies.append(f"--set {name}.max_length={max(2, length // 2)}")
    if recipe.data.max_tiles != 1:
        tiles = recipe.data.max_tiles or 12
        remedies.append(f"--set data.max_tiles={max(1, tiles // 2)}")
    remedies.append("or shard over more GPUs with torchrun")
    first = str(error).splitlines()[0] if str(error) else "out of memory"
    return MmmambaError(
        f"stage {stage.name} ran out of device memory after step {progress.step}: {first}",
        "what would help most: " + "; ".join(remedies[:3]) + " (accumulation changes no result; "
        "the others make the saved state another one, so begin anew with --overwrite)",
    )


def _next_divisor(batch: int, parts: int) -> int | None:
    """The next larger number of equal parts of a batch, or None."""
    return next((n for n in range(max(parts * 2, parts + 1), batch + 1) if batch % n == 0), None)


TRAINING = "training"


@dataclass(frozen=True)
class Watch:
    """What the caller sees and says while a stage runs; every method may do nothing."""

    # A line of text: what is being done, what was found.
    say: Callable[[str], None]
    # Called once with the stage and the names of what learns, before the first step.
    begin: Callable[[Stage, Mapping[str, Tensor], Progress], None]
    report: Report
    wants_to_stop: Callable[[], bool]


@dataclass(frozen=True)
class Options:
    """What the caller decides beside the recipe."""

    teacher: Path | None = None
    # Repeat finished stages, and go on with a repetition that was interrupted.
    overwrite: bool = False
    # Resume although the settings have changed.
    force: bool = False
    # Begin every stage at step 1, whatever states and products there are.
    restart: bool = False


def run_stage(
    run: Run,
    parent: Manifest,
    recipe: Recipe,
    stage: Stage,
    world: World,
    options: Options,
    watch: Watch,
    digests: Digests | None = None,
    log: OverwriteLog | None = None,
) -> Manifest:
    """Train one stage and write its product, or return the product if it is finished already.

    Continues from the newest training state of the same settings and data (`digests`). `log` is
    that of the command, where it overwrites. The caller holds the run's lock. Raises `RunError` if
    parent, teacher, state or a finished product do not fit, and `Stopped` if the user asked to
    stop.
    """
    name = stage_product(parent, stage)
    states = StateFolder(run.folder / TRAINING / name, world)
    request = Request(
        name=name,
        parent=parent,
        stage=stage,
        settings=settings_of(recipe, stage, parent, digests),
        overwrite=options.overwrite,
        restart=options.restart,
        force=options.force,
        repeated=None if log is None else log.created(name),
    )
    plan = world.on_main(lambda: make_plan(run, states, request))
    for remark in plan.remarks:
        watch.say(remark)
    if plan.done is not None:
        _finish(run, plan.done, states, world, watch, log, fresh=plan.fresh)
        return plan.done
    teacher, student = run.open_teacher(options.teacher), run.open_product(parent.name)
    names = expected_tensors(student.config)
    learning = learning_names(stage, student.config, names)
    adapters = adapted(stage, learning, names)
    objective = objective_of(stage, student.config, learning)
    loader, held_out = _loaders(student, recipe, stage, world)
    world.on_main(lambda: _verify(run, teacher, parent, watch))
    if plan.overwrite:
        # Now, and not when the new product is to take its place.
        world.on_main(lambda: check_product_folder(run.product_folder(name)))
    world.on_main(lambda: begin(states, plan))
    watch.say(f"loading teacher and student ({len(learning)} tensors learn)")
    pair = load_pair(
        teacher,
        student,
        [name for name in learning if name not in adapters],
        product_dtype=getattr(torch, parent.dtype),
        precision=stage.precision,
        device=world.device,
    )
    if stage.lora is not None:
        seed_everything(step_seed(recipe.seed, stage.name, "adapters"))
        pair = attach(pair, stage.lora, adapters)
    watch.begin(stage, pair.learning_parameters(), plan.progress)
    entries = ("mix", "mixing_matrix") if objective.layer_local else ()
    shard_mixers([block.mixer for block in pair.student.model.blocks], world, entries)
    job = Job(
        stage=stage,
        pair=pair,
        objective=objective,
        loader=loader,
        held_out=held_out,
        max_bad_share=recipe.data.max_bad_share,
        seed=recipe.seed,
        world=world,
        states=states,
        settings=request.settings,
    )
    progress = _train(job, plan.progress, recipe, run.folder / "tensorboard" / name, watch)
    made = _Made(run, name, parent, recipe, stage, student, plan, adapters, digests or {})
    manifest = _write(made, job, progress, watch)
    _finish(run, manifest, states, world, watch, log, fresh=True)
    return manifest


@dataclass(frozen=True)
class _Made:
    """What a product is made from, for writing it."""

    run: Run
    name: str
    parent: Manifest
    recipe: Recipe
    stage: Stage
    student: Checkpoint
    plan: Plan
    # Weights that have an adapter to be merged in.
    adapters: Sequence[str]
    digests: Digests


def _verify(run: Run, teacher: Checkpoint, parent: Manifest, watch: Watch) -> None:
    watch.say(f"checking teacher and {parent.name} against their hashes")
    run.verify_teacher(teacher)
    run.verify_product(parent.name)


def _loaders(
    student: Checkpoint, recipe: Recipe, stage: Stage, world: World
) -> tuple[StepLoader, StepLoader | None]:
    """Batches to learn from, and held-out ones if the recipe names any."""
    data = recipe.data
    if data.train is None:
        raise RunError(
            "there is nothing to learn from: the recipe's data.train is null",
            "name conversations with --data FILE (and --image-root FOLDER), or in the recipe",
        )
    processor = open_processor(student)
    if processor is None:
        raise RunError(
            f"{student.path} has no tokenizer, so conversations cannot be read",
            "seed again with --tokenizer FILE",
        )

    def loader(source: str, shuffle: bool, single_pass: bool = False) -> StepLoader:
        return StepLoader(
            open_corpus(source, None if data.image_root is None else Path(data.image_root)),
            processor,
            batch_size=stage.batch_size,
            accumulation=stage.accumulation,
            max_length=stage.max_length or data.max_length,
            batching=data.batching,
            shuffle=shuffle,
            seed=recipe.seed if data.shuffle_seed is None else data.shuffle_seed,
            max_tiles=data.max_tiles,
            workers=data.workers,
            pin_memory=world.device.type == "cuda",
            rank=world.rank,
            world_size=world.size,
            single_pass=single_pass,
        )

    held_out = None if data.held_out is None else loader(data.held_out, False, single_pass=True)
    return loader(data.train, data.shuffle), held_out


def _train(job: Job, progress: Progress, recipe: Recipe, board: Path, watch: Watch) -> Progress:
    log = MetricsLog(job.states.folder, progress.step, board) if job.world.is_main else None

    def report(result: StepResult) -> None:
        if log is not None:
            log.write(metrics_row(result))
        watch.report(result)

    try:
        return train(job, progress, report, watch.wants_to_stop)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(job.stage, recipe, progress, error) from error
    finally:
        if log is not None:
            log.close()


def _write(made: _Made, job: Job, progress: Progress, watch: Watch) -> Manifest:
    """The best student, if it is not the last, then the stage's product.

    In this order: the stage is done when its product is there.
    """
    best = progress.best_step
    if best is None or best == progress.step:
        return _write_one(made, job, progress, made.name, watch)
    last = _gather(job, made)
    job.states.load(job.states.best(best), job.pair.learning_parameters(), None)
    note = f"the student at step {best}, where the held-out loss was lowest"
    _write_one(made, job, progress, f"{made.name}-{BEST}", watch, note)
    return _write_one(made, job, progress, made.name, watch, learned=last)


def _finish(
    run: Run,
    product: Manifest,
    states: StateFolder,
    world: World,
    watch: Watch,
    log: OverwriteLog | None,
    fresh: bool,
) -> None:
    """Make the product current, and let the training states go.

    A `fresh` product, which was written from these states, gets their metrics first. All of it may
    have been done already, wholly or in part.
    """
    if world.is_main:
        if fresh:
            _move_metrics(states.folder / METRICS, run.product_folder(product.name), product)
            _remove_stale_best(run, product, watch)
        run.set_current(product.name)
        if log is not None:
            log.add(product)
    world.wait()
    states.clear()


def _move_metrics(file: Path, folder: Path, product: Manifest) -> None:
    """Copy the training's metrics to its product, unless they are another training's."""
    rows = list(read_metrics(file))
    if rows and rows[-1]["step"] == product.metrics.get("step"):
        atomic_write_text(folder / METRICS, file.read_text(encoding="utf-8"))
        plot_losses(folder)


def _remove_stale_best(run: Run, product: Manifest, watch: Watch) -> None:
    """Remove the best student of a training that this product's has replaced."""
    name = f"{product.name}-{BEST}"
    best = product.metrics.get("best_step")
    if name in run.products() and (best is None or best == product.metrics.get("step")):
        folder = run.product_folder(name)
        try:
            check_product_folder(folder)
        except CheckpointError as error:
            watch.say(f"{name} belongs to the {product.name} that was replaced; {error}")
            return
        shutil.rmtree(folder)
        watch.say(f"removed {name}: it belonged to the {product.name} that was replaced")


def _write_one(
    made: _Made,
    job: Job,
    progress: Progress,
    name: str,
    watch: Watch,
    note: str | None = None,
    learned: dict[str, Tensor] | None = None,
) -> Manifest:
    """Write `learned`, or the master weights as they are, with what stayed as it was."""
    watch.say(f"writing {name}")
    learned = _gather(job, made) if learned is None else learned
    student, parent = made.student, made.parent

    def read(key: str) -> Tensor:
        return learned[key] if key in learned else student.read(key)

    def parents() -> tuple[Parent, ...]:
        record = made.run.teacher
        return (
            Parent("student", parent.name, parent.content_hash),
            Parent("teacher", record.path, record.content_hash),
        )

    kept = {n: s for n, s in student.shapes.items() if n.startswith("unused.")}
    draft = Draft(
        name=name,
        made_by="distill",
        config=student.config,
        shapes={**expected_tensors(student.config), **kept},
        read=read,
        origin=student,
        dtype=getattr(torch, parent.dtype),
        recipe=dump_recipe(made.recipe),
        parents=parents,
        stages=(*parent.stages, made.stage.name),
        notes=(*parent_notes(parent, made.stage), *([note] if note else [])),
        final=is_final(made.stage),
        metrics=vars(progress),
        data=made.digests,
    )
    return job.world.on_main(
        lambda: write_product(made.run, draft, overwrite=made.plan.overwrite or note is not None)
    )


def _gather(job: Job, made: _Made) -> dict[str, Tensor]:
    """What was learned, by the student's own names, on process 0; nothing elsewhere."""
    learned: dict[str, Tensor] = {}
    for name, parameter in job.pair.learning_parameters().items():
        tensor = whole(parameter.detach())
        if job.world.is_main and not is_adapter(name):
            learned[name] = tensor.cpu()
    if job.stage.lora is not None:
        for name, update in updates(job.pair, job.stage.lora, made.adapters, whole).items():
            if job.world.is_main:
                learned[name] = made.student.read(name).float() + update
    return learned if job.world.is_main else {}


def parent_notes(parent: Manifest, stage: Stage) -> tuple[str, ...]:
    """The parent's notes that are still true."""
    return tuple(n for n in parent.notes if not (is_final(stage) and n.startswith("not yet")))
