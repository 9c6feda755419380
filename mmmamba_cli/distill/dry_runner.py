"""The runner of `distill --dry-run`: it checks and measures the stages, and trains nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from mmmamba_cli.checkpoint import AnyCheckpoint, Checkpoint
from mmmamba_cli.data import StepBatches, StepLoader
from mmmamba_cli.devices import free_cpu_memory
from mmmamba_cli.distill.dry_run_result import DryRun, Learning, StageForecast
from mmmamba_cli.distill.first_batch import describe_first_batch
from mmmamba_cli.distill.micro_batches import rows_at_most
from mmmamba_cli.distill.pipeline import (
    check_mixers,
    check_plan,
    choose_start_product,
    stages_to_run,
)
from mmmamba_cli.distill.stage_disk import estimate_disk, product_bytes
from mmmamba_cli.distill.stage_loaders import build_loaders
from mmmamba_cli.distill.stage_memory import (
    adapter_elements,
    estimate_memory,
)
from mmmamba_cli.distill.stage_models import StageModels, open_stage_models
from mmmamba_cli.distill.stage_rates import Rate, measured_rate, rate_of_run
from mmmamba_cli.distill.stage_shapes import StageShapes, shapes_of, trained_before
from mmmamba_cli.distill.trainable import layers_per_parameter
from mmmamba_cli.distill.validation import check_held_out
from mmmamba_cli.distributed import World
from mmmamba_cli.recipe import Recipe, Stage, attention_layers, stage_data
from mmmamba_cli.runs import Manifest, Run, open_training_processor


@dataclass(frozen=True)
class DryRunOptions:
    """Options of `dry_run`, as those of `distill`; `measure` times a step of each stage.

    `require_packed` as in `DistillOptions`.
    """

    wanted: Sequence[str] | None = None
    start: str | None = None
    teacher: Path | None = None
    processes: int = 1
    measure: bool = False
    require_packed: bool = False


def dry_run(
    run: Run,
    recipe: Recipe,
    device: torch.device,
    options: DryRunOptions | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> DryRun:
    """Say what `distill` would need and do; train nothing and write nothing.

    Teacher, product, recipe and the first batch of each stage are checked as `distill` checks them,
    except for the hashes of the weights.

    Raises:
        RunError: a stage that cannot be run, or no data.
        RecipeError: parameters that do not exist or that a loss does not reach.
        DataError: data that cannot be opened, or a first batch without a readable sample.
    """
    options = options or DryRunOptions()
    names = None if options.wanted is None else tuple(options.wanted)
    start = choose_start_product(run, recipe, names, options.start)
    check_mixers(run, recipe, start)
    models = open_stage_models(run, start.name, options.teacher)
    notes: list[str] = []
    context = _Context(run, recipe, device, options, start, models, log, notes)
    linear = shapes_of(models.student)
    stages, forecasts = stages_to_run(recipe, start, names), []
    check_plan(recipe, start, stages)
    hybrid_bytes, itemsize = 0, getattr(torch, start.dtype).itemsize
    for stage in stages:
        shapes = linear
        if stage.layers == "planned" and not start.attention_layers:
            layers = attention_layers(recipe.layers, start.num_layers)
            shapes = linear.with_attention(layers)
            if layers and not hybrid_bytes:
                hybrid_bytes = product_bytes(shapes, itemsize) + _unused_bytes(models.student)
            if layers and recipe.layers.select is not None:
                notes.append(
                    f"layers.select: {recipe.layers.select} chooses the attention layers while the "
                    "run goes on; layers of the placement stand for them here"
                )
        forecasts.append(_forecast(context, stage, shapes))
    return DryRun(
        start=start,
        device=str(device),
        processes=options.processes,
        stages=tuple(forecasts),
        free_memory=_free_memory(device),
        free_disk=shutil.disk_usage(run.folder).free,
        hybrid_bytes=hybrid_bytes,
        notes=tuple(dict.fromkeys(notes)),
    )


@dataclass(frozen=True)
class _Context:
    """What the forecasts of all stages share."""

    run: Run
    recipe: Recipe
    device: torch.device
    options: DryRunOptions
    start: Manifest
    models: StageModels
    log: Callable[[str], None]
    notes: list[str]

    @cached_property
    def tokenizer(self) -> Any:
        processor = open_training_processor(self.models.student)
        # `build_loaders` has refused a student without one.
        assert processor is not None
        return processor.tokenizer

    @property
    def holistic_vision(self) -> Any:
        """`vision_config` of a `HolisticVLM`; None for other models."""
        student = self.models.student
        return student.config.vision_config if isinstance(student, Checkpoint) else None


def _forecast(context: _Context, stage: Stage, shapes: StageShapes) -> StageForecast:
    recipe, options = context.recipe, context.options
    trainable, lora = shapes.trainable(stage)
    exists = shapes.layers.mixers == context.models.layers.mixers
    (context.models if exists else shapes).objective(stage, trainable)
    context.log(f"{stage.name}: reading the first batch")
    world, student = World(context.device), context.models.student
    loader, held_out = build_loaders(
        student,
        recipe,
        stage,
        world,
        context.notes.append,
        processes=options.processes,
        require_packed=options.require_packed,
    )
    if held_out is not None:
        check_held_out(held_out, world)
    batches = loader.step(0)
    batch = describe_first_batch(stage, loader, batches, context.tokenizer, context.holistic_vision)
    before = trained_before(recipe, stage, shapes)
    max_length = stage.max_length or stage_data(recipe.data, stage).max_length
    rows = rows_at_most(stage, max_length, options.processes)
    if batch.batching == "packed" and stage.accumulation != "auto":
        # Packed rows are as many as in this batch, since samples fill them.
        rows = batch.largest.rows
    longest = batch.at_length(max_length, rows)
    return StageForecast(
        stage=stage,
        attention_layers=_attention(shapes),
        learns=_learning(shapes, stage, trainable, lora),
        batch=batch,
        max_length=max_length,
        memory=estimate_memory(shapes, stage, batch.largest, before),
        memory_at_most=estimate_memory(shapes, stage, longest, before),
        disk=estimate_disk(
            shapes,
            stage,
            getattr(torch, context.start.dtype).itemsize,
            held_out is not None,
            _unused_bytes(student),
        ),
        tokens=round(batch.tokens / batch.samples * stage.batch_size * stage.steps),
        rate=_rate(context, stage, shapes, loader, batches),
    )


def _rate(
    context: _Context, stage: Stage, shapes: StageShapes, loader: StepLoader, batches: StepBatches
) -> Rate | None:
    """The measured rate of a stage; None where nothing was measured."""
    known = rate_of_run(context.run, stage)
    if not context.options.measure:
        return known
    if shapes.layers.mixers != context.models.layers.mixers:
        context.notes.append(
            f"{stage.name} was not measured: its hybrid does not exist before the run comes to it"
        )
        return known
    context.log(f"{stage.name}: loading both models and measuring a step")
    return measured_rate(
        context.models,
        context.recipe,
        stage,
        World(context.device),
        loader,
        batches,
        context.start.dtype,
    )


def _attention(shapes: StageShapes) -> tuple[int, ...]:
    linear = set(shapes.layers.linear)
    return tuple(i for i in range(len(shapes.layers.mixers)) if i not in linear)


def _learning(
    shapes: StageShapes, stage: Stage, trainable: Sequence[str], lora: Sequence[str]
) -> tuple[Learning, ...]:
    learning = [name for name in trainable if name not in set(lora)]
    sizes: dict[str, int] = {}
    for name in learning:
        (inner,) = layers_per_parameter([name])
        sizes[inner] = sizes.get(inner, 0) + prod(shapes.student[name])
    tensors = layers_per_parameter(learning)
    found = [Learning(name, tensors[name], sizes[name]) for name in sorted(tensors)]
    if lora:
        elements = adapter_elements(shapes, stage, lora)
        found.append(Learning("adapters", 2 * len(lora), elements))
    return tuple(found)


def _unused_bytes(student: AnyCheckpoint) -> int:
    """Bytes of the tensors that no forward pass reads."""
    names = [name for name in student.source.names if name.startswith("unused.")]
    return sum(student.source.info(name).nbytes for name in names)


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return free_cpu_memory()
