"""The training loop of all stages; a stage is a value that the loop receives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba_cli.data import StepBatches, StepLoader
from mmmamba_cli.distill.metrics import nonfinite_as_text
from mmmamba_cli.distill.model_pair import ModelPair
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.distill.optimiser import build_optimiser, clip_gradients, learning_rate
from mmmamba_cli.distill.training_state import Progress, StateFolder, state_record
from mmmamba_cli.distill.validation import (
    HeldOutMetrics,
    check_held_out,
    evaluate_held_out,
    gather_bad_samples,
)
from mmmamba_cli.distributed import (
    GradientSync,
    World,
    limit_cpu_threads,
    seed_everything,
    step_seed,
)
from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.recipe import Recipe, Stage

# A stage fails after this many skipped steps in a row.
MAX_SKIPPED_STEPS = 5
# The share of bad samples is checked from this many samples on.
MIN_SAMPLES_FOR_SHARE = 100


class Stopped(Exception):
    """The user asked to stop; the state has been saved."""


@dataclass(frozen=True)
class TrainingJob:
    """Models, loss, data and settings of one stage."""

    stage: Stage
    pair: ModelPair
    objective: Objective
    gradients: GradientSync
    loader: StepLoader
    # One pass over the held-out samples, or None.
    held_out: StepLoader | None
    max_bad_share: float
    seed: int
    world: World
    states: StateFolder
    # Settings that a resumed state must have been made with.
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class StepResult:
    """Results of one step, for logs and displays."""

    step: int
    loss: float
    terms: Mapping[str, float]
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    bad: tuple[str, ...] = ()
    skipped: str | None = None
    held_out: HeldOutMetrics | None = None
    memory_gib: float | None = None


StepCallback = Callable[[StepResult], None]


@dataclass
class _TrainState:
    """The parts of a training that its steps change."""

    parameters: Mapping[str, nn.Parameter]
    optimiser: torch.optim.AdamW
    progress: Progress


def train(
    job: TrainingJob,
    progress: Progress,
    on_step_end: StepCallback,
    should_stop: Callable[[], bool],
) -> Progress:
    """Train from `progress` to the last step, resuming from the state of `progress.step` if not 0.

    A step without a finite loss or without a readable sample is skipped. It keeps its place in the
    sample stream, so that resumed runs and other process counts see the same steps. `progress` is
    updated in place.

    Raises:
        Stopped: `should_stop` returned True; the state has been saved.
        DataError: too many samples are unreadable.
        MmmambaError: too many steps in a row were skipped, or all of them.
    """
    if job.held_out is not None:
        check_held_out(job.held_out, job.world)
    parameters = job.pair.trainable_parameters()
    no_decay = {name for name in parameters if job.objective.depends_on_part_of(name)}
    optimiser = build_optimiser(job.stage, parameters, no_decay)
    if progress.step:
        job.states.load(job.states.path(progress.step).name, parameters, optimiser)
    job.pair.checkpoint_layers(job.stage.checkpointing and not job.objective.layer_local)
    with limit_cpu_threads(job.world.device):
        _run_steps(job, _TrainState(parameters, optimiser, progress), on_step_end, should_stop)
    if progress.skipped_steps >= progress.step > 0:
        raise MmmambaError(
            f"stage {job.stage.name} learned nothing: all of its {progress.step} steps were "
            "skipped",
            "metrics.jsonl says why for each; see the samples with `mmmamba data check`",
        )
    return progress


def measure_step(job: TrainingJob, batches: StepBatches, repeats: int = 2) -> StepResult:
    """Run a step of a stage `repeats` times on weights in memory, and return the last result.

    Nothing is saved. The first step compiles kernels, so its time says little.
    """
    parameters = job.pair.trainable_parameters()
    optimiser = build_optimiser(job.stage, parameters)
    state = _TrainState(parameters, optimiser, Progress())
    job.pair.checkpoint_layers(job.stage.checkpointing and not job.objective.layer_local)
    with limit_cpu_threads(job.world.device):
        for _ in range(max(1, repeats)):
            result = _step(job, state, batches, time.perf_counter())
    return result


def _run_steps(
    job: TrainingJob,
    state: _TrainState,
    on_step_end: StepCallback,
    should_stop: Callable[[], bool],
) -> None:
    """Run the remaining steps, with the evaluations and saves due after each."""
    progress = state.progress
    saved = progress.step
    started = time.perf_counter()
    for batches in job.loader.steps(progress.step, job.stage.steps):
        result = _step(job, state, batches, started)
        if _is_due(job.stage.evaluate_every, progress.step, job.stage.steps):
            result = _evaluate(job, state, result)
        if job.world.is_main:
            on_step_end(result)
        stop = job.world.any(should_stop())
        if stop or _is_due(job.stage.save_every, progress.step, job.stage.steps):
            saved = _save(job, state)
        if stop and progress.step < job.stage.steps:
            raise Stopped
        started = time.perf_counter()
    if saved != progress.step:
        _save(job, state)


def _step(job: TrainingJob, state: _TrainState, batches: StepBatches, started: float) -> StepResult:
    """Run one optimiser step over the global batch and update the progress."""
    step, world, progress = batches.step, job.world, state.progress
    seed_everything(step_seed(job.seed, job.stage.name, step, world.rank))
    sums, units, counts = _accumulate(job, batches)
    tokens, samples, bad = (int(x) for x in counts)
    if bool(units.any()):
        loss = float((job.objective.term_weights(units) * sums).sum())
        norm = clip_gradients(state.parameters, job.stage.optimiser.clip)
        skip_reason = _find_nonfinite(job, loss, norm, sums)
    else:
        loss = norm = math.nan
        skip_reason = _explain_empty_step(samples, batches)
    rate = learning_rate(job.stage, step)
    if skip_reason is None:
        for group in state.optimiser.param_groups:
            group["lr"] = rate
        state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    progress.step = step + 1
    progress.tokens += tokens
    progress.samples += samples
    progress.bad_samples += bad
    progress.seconds += seconds
    progress.skipped_steps += skip_reason is not None
    # `max_bad_share` limits steps without a readable sample.
    if samples:
        progress.skipped_in_a_row = 0 if skip_reason is None else progress.skipped_in_a_row + 1
    # `bad` is summed over processes, so that either all of them gather or none does.
    named = gather_bad_samples(batches.bad, world) if bad else []
    _check_bad_share(job, progress, named)
    if progress.skipped_in_a_row >= MAX_SKIPPED_STEPS:
        names = [name for micro in batches.micro_batches for name in micro.names]
        raise MmmambaError(
            f"stage {job.stage.name} stopped at step {step + 1}: {MAX_SKIPPED_STEPS} steps in a "
            f"row were skipped; {skip_reason}; samples of the last: {', '.join(names[:10])}",
            "lower the stage's lr, or look at these samples with `mmmamba data check`",
        )
    # The mean of a term without units is NaN (0 / 0).
    per_term = (sums / units).tolist()
    return StepResult(
        step=progress.step,
        loss=loss,
        terms=dict(zip(job.objective.terms, per_term, strict=True)),
        learning_rate=rate,
        gradient_norm=norm,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        bad=tuple(named),
        skipped=skip_reason,
        memory_gib=_peak_memory_gib(world),
    )


def _accumulate(job: TrainingJob, batches: StepBatches) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulate gradients over the micro batches.

    Returns, summed over processes: sums (terms,), units (terms,) and the counts of tokens, samples
    and bad samples. Units are counted over the global batch before the first loss, because they
    divide its gradients.
    """
    world, pair, objective, gradients = job.world, job.pair, job.objective, job.gradients
    micros = [micro.to(pair.device) for micro in batches.micro_batches]
    counts = torch.tensor(
        [
            sum(micro.num_tokens for micro in micros),
            sum(micro.num_samples for micro in micros),
            sum(world.is_main or not sample.seen_by_all for sample in batches.bad),
        ],
        dtype=torch.float64,
    )
    # Units are counted on the CPU batches: counting on a GPU synchronizes.
    local = [objective.count_units(pair, micro) for micro in batches.micro_batches]
    total = world.all_reduce_sum(torch.cat((torch.stack(local).sum(0), counts)))
    num_terms = len(objective.terms)
    units, counts = total[:num_terms], total[num_terms:]
    if not bool(units.any()):
        return torch.zeros_like(units), units, counts
    weights = objective.term_weights(units) * gradients.loss_factor
    pair.student.train()
    gradients.begin_step()
    # On the device: reading a loss would wait for the GPU in each micro batch.
    sums = torch.zeros_like(units, device=pair.device)
    for index, micro in enumerate(micros):
        gradients.begin_micro_batch(is_last=index == len(micros) - 1)
        sums += objective.loss_sums(pair, micro, weights)
    return gradients.finish(sums, world), units, counts


def _find_nonfinite(job: TrainingJob, loss: float, norm: float, sums: Tensor) -> str | None:
    """Describe a loss or gradient that is not finite; None if all are finite."""
    if not math.isfinite(loss):
        named = zip(job.objective.terms, sums.tolist(), strict=True)
        bad = [term for term, value in named if not math.isfinite(value)]
        return f"the loss is {loss}" + (f" in {bad[0]}" if bad else "")
    if not math.isfinite(norm):
        for name, parameter in job.pair.trainable_parameters().items():
            gradient = parameter.grad
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return f"the gradient of {name} is not finite"
        return f"the gradient norm is {norm}"
    return None


def _explain_empty_step(samples: int, batches: StepBatches) -> str:
    """The reason why a step has no unit that the loss scores."""
    if samples == 0:
        return f"none of its {batches.num_planned} samples could be read"
    return f"none of its {samples} samples has a token that the loss scores"


def _check_bad_share(job: TrainingJob, progress: Progress, named: Sequence[str]) -> None:
    seen = progress.samples + progress.bad_samples
    share = progress.bad_samples / max(1, seen)
    too_early = seen < MIN_SAMPLES_FOR_SHARE and progress.step < job.stage.steps
    if share <= job.max_bad_share or too_early:
        return
    last = "; ".join(named[:3])
    raise DataError(
        f"{progress.bad_samples} of {seen} samples could not be used, more than "
        f"data.max_bad_share = {job.max_bad_share:g} allows"
        + (f"; the last: {last}" if last else ""),
        "see them all with `mmmamba data check --all`, or raise data.max_bad_share",
    )


def _evaluate(job: TrainingJob, state: _TrainState, result: StepResult) -> StepResult:
    """Add held-out metrics to the result, and save the student if it is the best so far."""
    if job.held_out is None:
        return result
    progress = state.progress
    job.pair.student.eval()
    steps = job.held_out.steps(0, job.held_out.steps_per_pass)
    found = evaluate_held_out(job.pair, job.objective, steps, job.world)
    progress.held_out = {"step": progress.step, **nonfinite_as_text(found.as_dict())}
    if _is_better(found.loss, progress.best_loss):
        progress.best_step, progress.best_loss = progress.step, found.loss
        name = job.states.best_name(progress.step)
        job.states.save(name, state.parameters, None, state_record(progress, job.settings))
    return replace(result, held_out=found)


def _is_better(loss: float, best: float | None) -> bool:
    """Whether a held-out loss is finite and the lowest so far."""
    if not math.isfinite(loss):
        return False
    return best is None or not math.isfinite(best) or loss < best


def _save(job: TrainingJob, state: _TrainState) -> int:
    """Save the state, remove older ones, and return its step."""
    progress = state.progress
    name = job.states.path(progress.step).name
    record = state_record(progress, job.settings)
    job.states.save(name, state.parameters, state.optimiser, record)
    job.states.prune(progress.step, progress.best_step)
    return progress.step


def _is_due(every: int | None, step: int, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def _peak_memory_gib(world: World) -> float | None:
    if world.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(world.device) / 2**30


def out_of_memory_error(
    stage: Stage, recipe: Recipe, progress: Progress, error: Exception
) -> MmmambaError:
    """An error that names the three settings that reduce memory most, with values to try."""
    length = stage.max_length or recipe.data.max_length
    name = f"stages.{stage.name}"
    remedies = []
    # The next larger number of micro batches that divides the batch.
    more = range(max(stage.accumulation * 2, stage.accumulation + 1), stage.batch_size + 1)
    accumulation = next((n for n in more if stage.batch_size % n == 0), None)
    if accumulation is not None:
        remedies.append(f"--set {name}.accumulation={accumulation}")
    if stage.precision != "bf16":
        remedies.append(f"--set {name}.precision=bf16")
    remedies.append(f"--set {name}.max_length={max(2, length // 2)}")
    if recipe.data.max_tiles != 1:
        tiles = recipe.data.max_tiles or 12
        remedies.append(f"--set data.max_tiles={max(1, tiles // 2)}")
    remedies.append("or more GPUs with --parallel shard")
    first = str(error).splitlines()[0] if str(error) else "out of memory"
    return MmmambaError(
        f"stage {stage.name} ran out of device memory after step {progress.step}: {first}",
        "what would help most: " + "; ".join(remedies[:3]) + " (accumulation does not change "
        "the result; with the other settings, start again with --overwrite)",
    )
