"""Run one stage: plan it, train, write its product."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import AnyCheckpoint, atomic_folder, atomic_write_text
from mmmamba_cli.distill.metrics import METRICS, MetricsLog, metrics_row, plot_losses, read_metrics
from mmmamba_cli.distill.model_pair import PairPlacement
from mmmamba_cli.distill.optimiser import full_tensor
from mmmamba_cli.distill.out_of_memory import out_of_memory_error
from mmmamba_cli.distill.parallelize import parallelize, plan_parallel
from mmmamba_cli.distill.recomputation import CudaMemory
from mmmamba_cli.distill.stage_attempt import (
    ATTEMPT_FILE,
    AttemptRecord,
    DistillOptions,
    OverwriteLog,
    StagePlan,
    StageRequest,
    plan_stage,
)
from mmmamba_cli.distill.stage_loaders import build_loaders
from mmmamba_cli.distill.stage_models import StageModels, open_stage_models, trainable_of
from mmmamba_cli.distill.trainable import (
    attach_lora,
    is_adapter,
    lora_deltas,
    name_without_adapter,
)
from mmmamba_cli.distill.trainer import (
    StepCallback,
    StepResult,
    TrainingJob,
    train,
)
from mmmamba_cli.distill.training_settings import Digests, stage_settings
from mmmamba_cli.distill.training_state import BEST, Progress, StateFolder
from mmmamba_cli.distributed import World, seed_everything, step_seed
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.recipe import Recipe, Stage, dump_recipe
from mmmamba_cli.runs import (
    Manifest,
    Parent,
    ProductSpec,
    Run,
    write_product,
)
from mmmamba_cli.runs.product import check_product_folder

TRAINING_FOLDER = "training"


@dataclass(frozen=True)
class StageCallbacks:
    """Functions of the caller that a stage calls while it runs."""

    # Prints one line of text.
    log: Callable[[str], None]
    # Called once before the first step, with the trainable parameters by name.
    on_stage_begin: Callable[[Stage, Mapping[str, Tensor], Progress], None]
    on_step_end: StepCallback
    should_stop: Callable[[], bool]


@dataclass(frozen=True)
class StageContext:
    """What all stages of one command share.

    `digests` are those of the stage's data, None if unknown; `overwrite_log` exists with
    `--overwrite` and `--restart` only.
    """

    run: Run
    recipe: Recipe
    world: World
    options: DistillOptions
    callbacks: StageCallbacks
    digests: Digests | None = None
    overwrite_log: OverwriteLog | None = None


@dataclass(frozen=True)
class _StageOutput:
    """Sources of the products of a stage."""

    name: str
    parent: Manifest
    models: StageModels
    plan: StagePlan
    job: TrainingJob
    progress: Progress
    # Weights whose adapters are merged into them.
    lora_weights: Sequence[str]


def stage_product_name(parent: Manifest, stage: Stage) -> str:
    """Name the product of a stage: `stage1`, `stage2`, `linear-stage3`, `hybrid-8-stage3`."""
    base = parent.name
    if parent.stages:
        base = base.removesuffix(f"-{parent.stages[-1]}")
    if parent.attention_layers:
        return f"{base}-{stage.name}"
    return f"linear-{stage.name}" if stage.layers == "planned" else stage.name


def is_final(stage: Stage) -> bool:
    """Whether a student has been distilled end to end after `stage`."""
    return stage.inputs == "student" and stage.loss == "kl"


def run_stage(context: StageContext, parent: Manifest, stage: Stage) -> Manifest:
    """Train one stage and write its product; return the existing product of a finished stage.

    Training resumes from the newest state of the same settings and data. The caller holds the lock
    of the run.

    Raises:
        RunError: parent, teacher, state or a finished product do not match the request.
        Stopped: the user asked to stop.
    """
    name = stage_product_name(parent, stage)
    log = context.overwrite_log
    states = StateFolder(context.run.folder / TRAINING_FOLDER / name, context.world)
    request = StageRequest(
        name=name,
        parent=parent,
        stage=stage,
        settings=stage_settings(context.recipe, stage, parent, context.digests),
        options=context.options,
        repeated=None if log is None else log.created(name),
    )
    plan = context.world.run_on_main(lambda: plan_stage(context.run, states, request))
    for message in plan.messages:
        context.callbacks.log(message)
    if plan.finished is not None:
        _finish(context, plan.finished, states, from_states=plan.from_states)
        return plan.finished
    output = _train_stage(context, request, plan, states)
    manifest = _write_products(context, output)
    _finish(context, manifest, states, from_states=True)
    return manifest


def _train_stage(
    context: StageContext, request: StageRequest, plan: StagePlan, states: StateFolder
) -> _StageOutput:
    """Check everything a stage needs, load both models, and train."""
    run, recipe, world, callbacks = context.run, context.recipe, context.world, context.callbacks
    stage, parent = request.stage, request.parent
    models = open_stage_models(run, parent.name, context.options.teacher)
    trainable, lora_weights = trainable_of(models, stage)
    objective = models.objective(stage, trainable)
    loader, held_out = build_loaders(
        models.student,
        recipe,
        stage,
        world,
        callbacks.log,
        require_packed=context.options.require_packed,
    )
    world.run_on_main(lambda: _verify_hashes(run, models.teacher, parent, callbacks))
    if plan.overwrite:
        # Before training, although the new product replaces the folder only afterwards.
        world.run_on_main(lambda: check_product_folder(run.product_folder(request.name)))
    world.run_on_main(lambda: _start_attempt(states, plan))
    callbacks.log(f"loading teacher and student ({len(trainable)} tensors learn)")
    pair = models.load(
        [name for name in trainable if name not in lora_weights],
        PairPlacement(getattr(torch, parent.dtype), stage.precision, world.device),
    )
    if stage.lora is not None:
        seed_everything(step_seed(recipe.seed, stage.name, "adapters"))
        pair = attach_lora(pair, stage.lora, lora_weights)
    callbacks.on_stage_begin(stage, pair.trainable_parameters(), plan.progress)
    parallel = plan_parallel(context.options.parallel, pair, world)
    if parallel.reason:
        callbacks.log(parallel.reason)
    is_gpu = world.device.type == "cuda"
    job = TrainingJob(
        stage=stage,
        pair=pair,
        objective=objective,
        gradients=parallelize(pair, objective, parallel, world),
        loader=loader,
        held_out=held_out,
        max_bad_share=recipe.data.max_bad_share,
        seed=recipe.seed,
        world=world,
        states=states,
        settings=request.settings,
        memory=CudaMemory(world.device, context.options.memory_share) if is_gpu else None,
        log=callbacks.log,
    )
    progress = _train_with_metrics(context, job, plan.progress, request.name)
    return _StageOutput(request.name, parent, models, plan, job, progress, lora_weights)


def _verify_hashes(
    run: Run, teacher: AnyCheckpoint, parent: Manifest, callbacks: StageCallbacks
) -> None:
    callbacks.log(f"checking teacher and {parent.name} against their hashes")
    run.verify_teacher(teacher)
    run.verify_product(parent.name)


def _start_attempt(states: StateFolder, plan: StagePlan) -> None:
    """Clear the state folder and write `attempt.json`, unless training resumes.

    An existing product stays until the new one is complete.
    """
    if plan.progress.step:
        return
    states.clear()
    text = AttemptRecord(replaces=plan.replaces).model_dump_json(indent=2) + "\n"
    # A folder without this file counts as one of an older version.
    with atomic_folder(states.folder) as partial:
        (partial / ATTEMPT_FILE).write_text(text, encoding="utf-8")


def _train_with_metrics(
    context: StageContext, job: TrainingJob, progress: Progress, name: str
) -> Progress:
    """Train, logging each step to `metrics.jsonl` and TensorBoard on process 0."""
    board = context.run.folder / "tensorboard" / name
    # The row of a step is written after its evaluation.
    written = progress.step if progress.unevaluated is None else progress.step - 1
    log = MetricsLog(job.states.folder, written, board) if job.world.is_main else None

    def on_step_end(result: StepResult) -> None:
        if log is not None:
            log.write(metrics_row(result))
        context.callbacks.on_step_end(result)

    try:
        return train(job, progress, on_step_end, context.callbacks.should_stop)
    except torch.OutOfMemoryError as error:
        parts = job.loader.count_micro_batches(progress.step)
        raise out_of_memory_error(job.stage, context.recipe, progress, error, parts) from error
    finally:
        if log is not None:
            log.close()


def _write_products(context: StageContext, output: _StageOutput) -> Manifest:
    """Write the best student, if it is not the last one, then the product of the stage.

    The order matters: a stage counts as finished once its product exists.
    """
    job, best = output.job, output.progress.best_step
    last = _gather_weights(output)
    if best is not None and best != output.progress.step:
        job.states.load(job.states.best_name(best), job.pair.trainable_parameters(), None)
        note = f"the student at step {best}, where the held-out loss was lowest"
        _write_one(context, output, f"{output.name}-{BEST}", _gather_weights(output), note)
    return _write_one(context, output, output.name, last)


def _write_one(
    context: StageContext,
    output: _StageOutput,
    name: str,
    weights: Mapping[str, Tensor],
    note: str | None = None,
) -> Manifest:
    """Write a product from the trained `weights` and the unchanged ones of the parent."""
    context.callbacks.log(f"writing {name}")
    models, parent, stage = output.models, output.parent, output.job.stage

    def read(stored: str) -> Tensor:
        name = models.model_name(stored)
        return weights[name] if name in weights else models.student.read(stored)

    def parents() -> tuple[Parent, ...]:
        record = context.run.teacher
        return (
            Parent("student", parent.name, parent.content_hash),
            Parent("teacher", record.path, record.content_hash),
        )

    final = is_final(stage)
    # A student that is distilled end to end is no longer "not yet distilled".
    notes = [n for n in parent.notes if not (final and n.startswith("not yet"))]
    spec = ProductSpec(
        name=name,
        made_by="distill",
        model=models.product_model(getattr(torch, parent.dtype)),
        read=read,
        recipe=dump_recipe(context.recipe),
        parents=parents,
        stages=(*parent.stages, stage.name),
        notes=(*notes, *([note] if note else [])),
        final=final,
        metrics=output.progress.as_dict(),
        data=context.digests or {},
    )
    overwrite = output.plan.overwrite or note is not None
    return context.world.run_on_main(lambda: write_product(context.run, spec, overwrite=overwrite))


def _gather_weights(output: _StageOutput) -> dict[str, Tensor]:
    """Gather the trained weights on process 0, adapters merged; empty on the other processes."""
    job = output.job
    weights: dict[str, Tensor] = {}
    for name, parameter in job.pair.trainable_parameters().items():
        tensor = full_tensor(parameter.detach())
        if job.world.is_main and not is_adapter(name):
            # A copy on a CPU too: the best student is loaded into the parameters later.
            weights[name_without_adapter(name)] = tensor.to("cpu", copy=True)
    if job.stage.lora is not None:
        deltas = lora_deltas(job.pair, job.stage.lora, output.lora_weights, full_tensor)
        for name, delta in deltas.items():
            if job.world.is_main:
                weights[name] = output.models.read(name).float() + delta
    return weights


def _finish(
    context: StageContext, product: Manifest, states: StateFolder, from_states: bool
) -> None:
    """Make the product current and remove the training states.

    With `from_states`, the product was trained from these states, and their metrics are copied to
    it first. Safe to repeat: an interrupted command may have done some or all of this.
    """
    run, world = context.run, context.world
    if world.is_main:
        if from_states:
            _copy_metrics(states.folder / METRICS, run.product_folder(product.name), product)
            _remove_stale_best(run, product, context.callbacks)
        run.set_current(product.name)
        if context.overwrite_log is not None:
            context.overwrite_log.add(product)
    world.barrier()
    states.clear()


def _copy_metrics(file: Path, folder: Path, product: Manifest) -> None:
    """Copy the metrics to the product's folder, unless they belong to another training."""
    rows = list(read_metrics(file))
    if rows and rows[-1]["step"] == product.metrics.get("step"):
        atomic_write_text(folder / METRICS, file.read_text(encoding="utf-8"))
        plot_losses(folder)


def _remove_stale_best(run: Run, product: Manifest, callbacks: StageCallbacks) -> None:
    """Remove the best student of an earlier training, whose product has been replaced."""
    name = f"{product.name}-{BEST}"
    best = product.metrics.get("best_step")
    if name in run.products() and (best is None or best == product.metrics.get("step")):
        folder = run.product_folder(name)
        try:
            check_product_folder(folder)
        except CheckpointError as error:
            callbacks.log(f"{name} belongs to the {product.name} that was replaced; {error}")
            return
        shutil.rmtree(folder)
        callbacks.log(f"removed {name}: it belonged to the {product.name} that was replaced")
