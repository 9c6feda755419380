"""The training loop of all stages; a stage is a value that the loop receives."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba_cli.data import StepBatches, StepLoader, check_bad_share
from mmmamba_cli.distill.metrics import nonfinite_as_text
from mmmamba_cli.distill.model_pair import ModelPair
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.distill.optimiser import build_optimiser, learning_rate, step_if
from mmmamba_cli.distill.recomputation import CudaMemory, Decision, MemoryMeter, Recomputation
from mmmamba_cli.distill.step_values import (
    DeviceValues,
    QueuedStep,
    StepResult,
    explain_empty_step,
    read_step,
)
from mmmamba_cli.distill.training_state import Progress, StateFolder, state_record
from mmmamba_cli.distill.validation import (
    check_held_out,
    evaluate_held_out,
    gather_bad_samples,
    is_better,
)
from mmmamba_cli.distributed import (
    GradientSync,
    World,
    limit_cpu_threads,
    seed_everything,
    step_seed,
)
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.recipe import Stage

# A stage fails after this many skipped steps in a row.
MAX_SKIPPED_STEPS = 5
# The share of bad samples is checked from this many samples on.
MIN_SAMPLES_FOR_SHARE = 100


class Stopped(Exception):
    """The user asked to stop; the state has been saved."""


def _silent(text: str) -> None:
    """Print nothing."""


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
    # Memory for metrics and for `checkpointing: auto`; None takes that of the device.
    memory: MemoryMeter | None = None
    # Prints one line of text.
    log: Callable[[str], None] = _silent


StepCallback = Callable[[StepResult], None]


@dataclass
class _TrainState:
    """The parts of a training that its steps change."""

    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.AdamW
    progress: Progress
    # Steps whose values have not been read, oldest first.
    queued: deque[QueuedStep] = field(default_factory=deque)
    # Whether parameters and moments are those of `progress.step`, and not partly of the next one.
    is_complete: bool = True
    # The result of the last step while it is evaluated.
    unevaluated: StepResult | None = None
    # When the last step was read, on the clock of `time.perf_counter`.
    read_at: float = 0.0


def steps_read_late(device: torch.device) -> int:
    """Number of steps that are queued behind the one whose values are read.

    One on a GPU, which then always has kernels to run. The CPU has nothing to wait for.
    """
    return 0 if device.type == "cpu" else 1


def train(
    job: TrainingJob,
    progress: Progress,
    on_step_end: StepCallback,
    should_stop: Callable[[], bool],
) -> Progress:
    """Train from `progress` to the last step, resuming from the state of `progress.step` if not 0.

    A step without a finite loss or without a readable sample is skipped. It keeps its place in the
    sample stream, so that resumed runs and other process counts see the same steps. `progress` is
    updated in place. On a GPU, `on_step_end` gets a step when the next one is queued, and before
    any state is saved.

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
    meter = _memory_meter(job)
    if meter is not None:
        # A process may have trained other models before.
        meter.reset_peak()
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
    recomputation = _checkpoint_layers(job, state.progress)
    with limit_cpu_threads(job.world.device):
        for _ in range(max(1, repeats)):
            if recomputation is not None:
                _decide_recomputation(job, state, recomputation, batches)
            state.read_at = time.perf_counter()
            result = _read_step(job, state, _step(job, state, batches))
    return result


def _run_steps(
    job: TrainingJob,
    state: _TrainState,
    on_step_end: StepCallback,
    should_stop: Callable[[], bool],
) -> None:
    """Run the remaining steps, with the evaluations and saves due after each."""
    progress, stage, world = state.progress, job.stage, job.world
    late = steps_read_late(world.device)
    recomputation = _checkpoint_layers(job, progress)
    saved = progress.step

    def read(limit: int, is_evaluated: bool = False) -> None:
        """Read queued steps until `limit` are left; the newest one may be evaluated."""
        while len(state.queued) > limit:
            result = _read_step(job, state, state.queued.popleft())
            if is_evaluated and not state.queued:
                state.unevaluated = result
                result = _evaluate(job, state, result)
                state.unevaluated = None
            if world.is_main:
                on_step_end(result)

    if progress.unevaluated is not None:
        result = _evaluate(job, state, StepResult.from_dict(progress.unevaluated))
        progress.unevaluated = None
        if world.is_main:
            on_step_end(result)
    state.read_at = time.perf_counter()
    try:
        for batches in job.loader.steps(progress.step, stage.steps):
            if recomputation is not None:
                _decide_recomputation(job, state, recomputation, batches)
            state.queued.append(_step(job, state, batches))
            is_evaluated = _is_due(stage.evaluate_every, progress.step, stage.steps)
            read(0 if is_evaluated else late, is_evaluated)
            stop = world.any(should_stop())
            if stop or _is_due(stage.save_every, progress.step, stage.steps):
                read(0)
                saved = _save(job, state)
            if is_evaluated or saved == progress.step:
                # Seconds of a step are those of training.
                state.read_at = time.perf_counter()
            if stop and progress.step < stage.steps:
                raise Stopped
    except (MmmambaError, torch.OutOfMemoryError) as error:
        # Steps before the one that failed are complete.
        read(0)
        # Several processes save together, and the others do not run out of memory.
        can_save = state.is_complete and world.size == 1 and progress.step > saved
        if isinstance(error, torch.OutOfMemoryError) and can_save:
            if state.unevaluated is not None:
                progress.unevaluated = state.unevaluated.as_dict()
            _save(job, state)
        raise
    if saved != progress.step:
        _save(job, state)


def _checkpoint_layers(job: TrainingJob, progress: Progress) -> Recomputation | None:
    """Set activation checkpointing of the stage; the result decides it if it is `auto`."""
    choice, pair = job.stage.checkpointing, job.pair
    if job.objective.layer_local or choice != "auto":
        recomputes = bool(choice) and not job.objective.layer_local
        pair.checkpoint_layers(len(pair.checkpointable_layers) if recomputes else 0)
        return None
    earlier = None if progress.recomputation is None else Decision(**progress.recomputation)
    varies = job.stage.accumulation == "auto"
    found = Recomputation(pair, job.world, _memory_meter(job), job.log, earlier, varies)
    progress.recomputation = None if found.decision is None else asdict(found.decision)
    return found


def _decide_recomputation(
    job: TrainingJob, state: _TrainState, recomputation: Recomputation, batches: StepBatches
) -> None:
    """Decide which layers recompute before the step of `batches`, measuring if necessary."""

    def run(part: StepBatches) -> bool:
        _, units, _ = _accumulate(job, part)
        state.optimiser.zero_grad(set_to_none=True)
        return bool(units.any())

    if recomputation.prepare_step(batches, run):
        # The time of a measured step is not that of training.
        state.read_at = time.perf_counter()
    if recomputation.decision is not None:
        state.progress.recomputation = asdict(recomputation.decision)


def _step(job: TrainingJob, state: _TrainState, batches: StepBatches) -> QueuedStep:
    """Queue one optimiser step over the global batch; update what the host knows of progress.

    The step is taken on the device only if loss and gradient norm are finite.
    """
    step, world, progress, meter = batches.step, job.world, state.progress, _memory_meter(job)
    seed_everything(step_seed(job.seed, job.stage.name, step, world.rank))
    sums, units, counts = _accumulate(job, batches)
    tokens, samples, bad = (int(x) for x in counts)
    rate = learning_rate(job.stage, step)
    values = empty = None
    if bool(units.any()):
        weights = job.objective.term_weights(units)
        values = DeviceValues(sums, weights, state.parameters, job.stage.optimiser.clip)
        for group in state.optimiser.param_groups:
            group["lr"] = rate
        state.is_complete = False
        step_if(state.optimiser, values.is_finite)
    else:
        empty = explain_empty_step(samples, batches)
    state.optimiser.zero_grad(set_to_none=True)
    progress.step, state.is_complete = step + 1, True
    progress.tokens += tokens
    progress.samples += samples
    progress.bad_samples += bad
    # `bad` is summed over processes, so that either all of them gather or none does.
    named = gather_bad_samples(batches.bad, world) if bad else []
    seen = progress.samples + progress.bad_samples
    if seen >= MIN_SAMPLES_FOR_SHARE or progress.step >= job.stage.steps:
        check_bad_share(progress.bad_samples, seen, job.max_bad_share, named)
    return QueuedStep(
        step=progress.step,
        units=units,
        values=values,
        empty=empty,
        learning_rate=rate,
        tokens=tokens,
        samples=samples,
        names=tuple(name for micro in batches.micro_batches for name in micro.names),
        bad=tuple(named),
        memory_gib=None if meter is None else meter.peak() / 2**30,
    )


def _read_step(job: TrainingJob, state: _TrainState, queued: QueuedStep) -> StepResult:
    """Wait for the values of a step, and complete the progress.

    Raises:
        MmmambaError: too many steps in a row were skipped.
    """
    progress = state.progress
    result, read_at = read_step(queued, job.objective, job.world, state.read_at)
    progress.seconds += read_at - state.read_at
    state.read_at = read_at
    progress.skipped_steps += result.skipped is not None
    # `max_bad_share` limits steps without a readable sample.
    if queued.samples:
        in_a_row = 0 if result.skipped is None else progress.skipped_in_a_row + 1
        progress.skipped_in_a_row = in_a_row
    if progress.skipped_in_a_row >= MAX_SKIPPED_STEPS:
        # Training ends with this step.
        state.queued.clear()
        raise MmmambaError(
            f"stage {job.stage.name} stopped at step {queued.step}: {MAX_SKIPPED_STEPS} steps in a "
            f"row were skipped; {result.skipped}; samples of the last: "
            f"{', '.join(queued.names[:10])}",
            "lower the stage's lr, or look at these samples with `mmmamba data check`",
        )
    return result


def _accumulate(job: TrainingJob, batches: StepBatches) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulate gradients over the micro batches.

    Returns, summed over processes: sums (terms,) on the pair's device, units (terms,) and the
    counts of tokens, samples and bad samples, on the CPU. Units are counted over the global batch
    before the first loss, because they divide its gradients.
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


def _evaluate(job: TrainingJob, state: _TrainState, result: StepResult) -> StepResult:
    """Add held-out metrics to the result, and save the student if it is the best so far."""
    if job.held_out is None:
        return result
    progress = state.progress
    job.pair.student.eval()
    steps = job.held_out.steps(0, job.held_out.steps_per_pass)
    found = evaluate_held_out(job.pair, job.objective, steps, job.world)
    progress.held_out = {"step": progress.step, **nonfinite_as_text(found.as_dict())}
    if is_better(found.loss, progress.best_loss):
        progress.best_step, progress.best_loss = progress.step, found.loss
        name = job.states.best_name(progress.step)
        job.states.save(name, state.parameters, None, state_record(progress, job.settings))
    return replace(result, held_out=found)


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


def _memory_meter(job: TrainingJob) -> MemoryMeter | None:
    device = job.world.device
    return CudaMemory(device) if job.memory is None and device.type == "cuda" else job.memory
