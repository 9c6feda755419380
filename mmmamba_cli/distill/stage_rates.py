"""How fast a stage trains: as measured earlier in a run, or by a step in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from mmmamba_cli.data import StepBatches, StepLoader
from mmmamba_cli.distill.metrics import METRICS, read_metrics
from mmmamba_cli.distill.model_pair import PairPlacement
from mmmamba_cli.distill.out_of_memory import out_of_memory_error
from mmmamba_cli.distill.parallelize import ParallelPlan, parallelize
from mmmamba_cli.distill.stage_models import StageModels, trainable_of
from mmmamba_cli.distill.trainable import attach_lora
from mmmamba_cli.distill.trainer import TrainingJob, measure_step
from mmmamba_cli.distill.training_state import Progress, StateFolder
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe import Recipe, Stage, parse_recipe
from mmmamba_cli.runs import Run

TRAINING_FOLDER = "training"
# Settings of a stage on which its speed depends most.
SPEED_SETTINGS = ("loss", "learns", "inputs", "precision", "checkpointing", "lora")
# Steps at the end of a metrics file whose rate counts: the first ones compile kernels.
LAST_STEPS = 20


@dataclass(frozen=True)
class Rate:
    """Tokens per second of all processes, where they were measured, and the peak of the memory."""

    tokens_per_second: float
    source: str
    peak_gib: float | None = None


def rate_of_run(run: Run, stage: Stage) -> Rate | None:
    """The rate of an interrupted training of the stage, or of a product of a stage like it."""
    rate = _rate_of_states(run, stage)
    if rate is not None:
        return rate
    for product in reversed(run.products().values()):
        tokens, seconds = (product.metrics.get(name) or 0 for name in ("tokens", "seconds"))
        if not product.stages or not tokens or not seconds:
            continue
        try:
            stages = parse_recipe(product.recipe, product.name).stages
        except RecipeError:
            continue
        made = next((one for one in stages if one.name == product.stages[-1]), None)
        if made is not None and _is_alike(made, stage):
            return Rate(tokens / seconds, f"{product.name} of this run")
    return None


def _is_alike(one: Stage, other: Stage) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in SPEED_SETTINGS)


def _rate_of_states(run: Run, stage: Stage) -> Rate | None:
    folder = run.folder / TRAINING_FOLDER
    if not folder.is_dir():
        return None
    for states in sorted(folder.iterdir()):
        if states.name != stage.name and not states.name.endswith(f"-{stage.name}"):
            continue
        rates = [row.get("tokens_per_second", 0) for row in read_metrics(states / METRICS)]
        known = [rate for rate in rates[-LAST_STEPS:] if rate]
        if known:
            return Rate(median(known), f"the interrupted {states.name} of this run")
    return None


def measured_rate(
    models: StageModels,
    recipe: Recipe,
    stage: Stage,
    world: World,
    loader: StepLoader,
    batches: StepBatches,
    dtype: str,
) -> Rate:
    """Load both models, run two steps of a stage in memory, and return the rate of the second.

    Args:
        models: whose layer plan is that of the stage.
        world: a single process.
        batches: of the first step of `loader`.
        dtype: of the product that the stage starts from.

    Raises:
        MmmambaError: the step runs out of memory, or its loss is not finite.
    """
    trainable, lora = trainable_of(models, stage)
    objective = models.objective(stage, trainable)
    pair = models.load(
        [name for name in trainable if name not in lora],
        PairPlacement(getattr(torch, dtype), stage.precision, world.device),
    )
    if stage.lora is not None:
        pair = attach_lora(pair, stage.lora, lora)
    job = TrainingJob(
        stage=stage,
        pair=pair,
        objective=objective,
        gradients=parallelize(pair, objective, ParallelPlan("replicate"), world),
        loader=loader,
        held_out=None,
        max_bad_share=1.0,
        seed=recipe.seed,
        world=world,
        # Nothing is saved.
        states=StateFolder(Path(), world),
        settings={},
    )
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    try:
        result = measure_step(job, batches)
    except torch.OutOfMemoryError as error:
        raise out_of_memory_error(
            stage, recipe, Progress(), error, len(batches.micro_batches)
        ) from error
    source = f"a step on {world.device}"
    return Rate(result.tokens_per_second, source, result.memory_gib)
