"""The one training loop: every stage is a value given to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba_cli.data import StepBatches, StepLoader
from mmmamba_cli.distill.metrics import finite
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.distill.optimiser import build_optimiser, clip, learning_rate
from mmmamba_cli.distill.teacher_student import Pair
from mmmamba_cli.distill.training_state import Progress, StateFolder, state_record
from mmmamba_cli.distill.validation import HeldOut, all_bad, check_held_out, evaluate
from mmmamba_cli.distributed import World, average_whole, host_threads, seed_everything, step_seed
from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.recipe import Stage

# Steps in a row that may be skipped before a stage ends with an error.
MAX_SKIPPED = 5
# A few bad samples at the start of a run say nothing about a share.
MIN_SAMPLES_FOR_SHARE = 100


class Stopped(Exception):
    """Raised when the user asked the loop to stop and the state was saved."""


@dataclass(frozen=True)
class Job:
    """All that a stage needs to run."""

    stage: Stage
    pair: Pair
    objective: Objective
    loader: StepLoader
    # One pass over the held-out samples, or None.
    held_out: StepLoader | None
    max_bad_share: float
    seed: int
    world: World
    states: StateFolder
    # What a resumed state must have been made with.
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class StepResult:
    """One step, as logs and displays see it."""

    step: int
    loss: float
    terms: Mapping[str, float]
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    bad: tuple[str, ...] = ()
    skipped: str | None = None
    held_out: HeldOut | None = None
    memory_gib: float | None = None


Report = Callable[[StepResult], None]


def train(
    job: Job, progress: Progress, report: Report, wants_to_stop: Callable[[], bool]
) -> Progress:
    """Run the steps of the stage that `progress` lacks; the newest state must be loaded already.

    A step none of whose samples could be read is skipped, as one without a finite loss is: its
    place in the stream stays its own, so that resumed runs and other numbers of processes see the
    same steps.

    Raises `Stopped` when `wants_to_stop` said so, after saving; `MmmambaError` when losses stay
    non-finite, or too many samples are unreadable.
    """
    if job.held_out is not None:
        check_held_out(job.held_out, job.world)
    parameters = job.pair.learning_parameters()
    in_part = {name for name in parameters if job.objective.reaches_part(name)}
    optimiser = build_optimiser(job.stage, parameters, in_part)
    if progress.step:
        job.states.load(job.states.path(progress.step).name, parameters, optimiser)
    decoder = job.pair.student.model
    decoder.checkpoint_layers(job.stage.checkpointing and not job.objective.layer_local)
    with host_threads(job.world.device):
        _run_steps(job, parameters, optimiser, progress, report, wants_to_stop)
    if progress.skipped_steps >= progress.step > 0:
        raise MmmambaError(
            f"stage {job.stage.name} learned nothing: all of its {progress.step} steps were "
            "skipped",
            "metrics.jsonl says why for each; see the samples with `mmmamba data check`",
        )
    return progress


def _run_steps(
    job: Job,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.AdamW,
    progress: Progress,
    report: Report,
    wants_to_stop: Callable[[], bool],
) -> None:
    """The steps that `progress` lacks, with what is due behind each, and a state at the end."""
    saved = progress.step
    started = time.perf_counter()
    for batches in job.loader.steps(progress.step, job.stage.steps):
        result = _step(job, parameters, optimiser, batches, progress, started)
        if _is_due(job.stage.evaluate_every, progress.step, job.stage.steps):
            result = _with_held_out(job, parameters, result, progress)
        if job.world.is_main:
            report(result)
        stop = job.world.any(wants_to_stop())
        if stop or _is_due(job.stage.save_every, progress.step, job.stage.steps):
            saved = _save(job, parameters, optimiser, progress)
        if stop and progress.step < job.stage.steps:
            raise Stopped
        started = time.perf_counter()
    if saved != progress.step:
        _save(job, parameters, optimiser, progress)


def _step(
    job: Job,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.AdamW,
    batches: StepBatches,
    progress: Progress,
    started: float,
) -> StepResult:
    """One optimiser step over the global batch, and its place in the books."""
    step, world = batches.step, job.world
    seed_everything(step_seed(job.seed, job.stage.name, step, world.rank))
    sums, units, counts = _accumulate(job, batches)
    tokens, samples, bad = (int(x) for x in counts)
    if bool(units.any()):
        loss = float((job.objective.weigh(units) * sums).sum())
        norm = clip(parameters, job.stage.optimiser.clip)
        trouble = _trouble(job, loss, norm, sums)
    else:
        loss = norm = math.nan
        trouble = _nothing_to_learn(samples, batches)
    rate = learning_rate(job.stage, step)
    if trouble is None:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    progress.step = step + 1
    progress.tokens += tokens
    progress.samples += samples
    progress.bad_samples += bad
    progress.seconds += seconds
    _count_skipped(progress, trouble, unreadable=samples == 0)
    # The sum over processes is known to each of them, so that either all gather or none does.
    named = all_bad(batches.bad, world) if bad else []
    _check_bad_share(job, progress, named)
    if progress.skipped_in_a_row >= MAX_SKIPPED:
        names = [name for micro in batches.micro for name in micro.names]
        raise MmmambaError(
            f"stage {job.stage.name} stopped at step {step + 1}: {MAX_SKIPPED} steps in a row "
            f"were skipped; {trouble}; samples of the last: {', '.join(names[:10])}",
            "lower the stage's lr, or look at these samples with `mmmamba data check`",
        )
    # 0 / 0, the mean of a term over nothing, is NaN.
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
        skipped=trouble,
        memory_gib=_peak_memory(world),
    )


def _accumulate(job: Job, batches: StepBatches) -> tuple[Tensor, Tensor, Tensor]:
    """Add up gradients over the micro batches; sums and units of each term, and counts, globally.

    Units are counted over the whole global batch before the first loss, since they are what its
    gradients are divided by.
    """
    world, pair, objective = job.world, job.pair, job.objective
    micros = [micro.to(pair.device) for micro in batches.micro]
    counts = torch.tensor(
        [
            sum(micro.num_tokens for micro in micros),
            sum(micro.num_samples for micro in micros),
            sum(world.is_main or not sample.seen_by_all for sample in batches.bad),
        ],
        dtype=torch.float64,
    )
    # Counted where the loader left them, on the CPU: a count on a GPU would be waited for.
    own = torch.stack([objective.count(pair, micro) for micro in batches.micro]).sum(0)
    together = world.add_up(torch.cat((own, counts)))
    units, counts = together[: len(own)], together[len(own) :]
    if not bool(units.any()):
        return torch.zeros_like(units), units, counts
    # FSDP averages gradients over processes; here they are parts of one sum.
    weights = objective.weigh(units) * world.size
    pair.student.train()
    sums = torch.zeros_like(units)
    for micro in micros:
        sums += objective.sums(pair, micro, weights)
    average_whole(pair.learning_parameters().values(), world)
    return world.add_up(sums), units, counts


def _trouble(job: Job, loss: float, norm: float, sums: Tensor) -> str | None:
    """Why the step must not be taken, or None."""
    if not math.isfinite(loss):
        named = zip(job.objective.terms, sums.tolist(), strict=True)
        bad = [term for term, value in named if not math.isfinite(value)]
        return f"the loss is {loss}" + (f" in {bad[0]}" if bad else "")
    if not math.isfinite(norm):
        for name, parameter in job.pair.learning_parameters().items():
            gradient = parameter.grad
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return f"the gradient of {name} is not finite"
        return f"the gradient norm is {norm}"
    return None


def _count_skipped(progress: Progress, trouble: str | None, *, unreadable: bool) -> None:
    progress.skipped_steps += trouble is not None
    # Steps without a readable sample are limited by max_bad_share instead.
    if not unreadable:
        progress.skipped_in_a_row = 0 if trouble is None else progress.skipped_in_a_row + 1


def _nothing_to_learn(samples: int, batches: StepBatches) -> str:
    """Why a step has nothing that a loss could be taken over."""
    if samples == 0:
        return f"none of its {batches.num_planned} samples could be read"
    return f"none of its {samples} samples has a token that the loss scores"


def _check_bad_share(job: Job, progress: Progress, named: Sequence[str]) -> None:
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


def _with_held_out(
    job: Job, parameters: Mapping[str, nn.Parameter], result: StepResult, progress: Progress
) -> StepResult:
    """The result with held-out numbers; the best student so far is kept aside."""
    if job.held_out is None:
        return result
    job.pair.student.eval()
    steps = job.held_out.steps(0, job.held_out.steps_per_pass)
    found = evaluate(job.pair, job.objective, steps, job.world)
    progress.held_out = {"step": progress.step, **finite(found.as_dict())}
    if _is_better(found.loss, progress.best_loss):
        progress.best_step, progress.best_loss = progress.step, found.loss
        name = job.states.best(progress.step)
        job.states.save(name, parameters, None, state_record(progress, job.settings))
    return replace(result, held_out=found)


def _is_better(loss: float, best: float | None) -> bool:
    """Whether a held-out loss is the lowest so far; one that is not finite never is."""
    if not math.isfinite(loss):
        return False
    return best is None or not math.isfinite(best) or loss < best


def _save(
    job: Job,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.AdamW,
    progress: Progress,
) -> int:
    name = job.states.path(progress.step).name
    job.states.save(name, parameters, optimiser, state_record(progress, job.settings))
    job.states.drop_others(progress.step, progress.best_step)
    return progress.step


def _is_due(every: int | None, step: int, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def _peak_memory(world: World) -> float | None:
    if world.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(world.device) / 2**30
