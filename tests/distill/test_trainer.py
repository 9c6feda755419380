"""The training loop: accumulation, resuming, skipped steps, saved states."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_distillation import (
    ChangedLoader,
    RandomLoader,
    equal,
    explosive,
    make_job,
    poisoned,
    run_job,
)
from torch import Tensor

from mmmamba_cli.data import BadSample, StepBatches
from mmmamba_cli.distill import trainer
from mmmamba_cli.distill.optimiser import build_optimiser, learning_rate, lr_factor
from mmmamba_cli.distill.step_values import DeviceValues, StepValues
from mmmamba_cli.distill.trainer import StepResult, TrainingJob, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import limit_cpu_threads
from mmmamba_cli.errors import DataError, MmmambaError, RunError
from mmmamba_cli.recipe import Schedule

STEPS = 6


@pytest.mark.parametrize(("loss", "plan"), [("mixer-mse", "mdwk"), ("kl", "gdam")])
def test_stopping_and_resuming_gives_the_same_bits(loss: str, plan: str, tmp_path: Path) -> None:
    whole, learned = run_job(make_job(tmp_path / "a", loss, steps=STEPS, plan=plan))
    begun, _ = run_job(make_job(tmp_path / "b", loss, steps=STEPS, plan=plan), stop_at=3)
    job = make_job(tmp_path / "b", loss, steps=STEPS, plan=plan)
    assert job.states.steps() == [3]
    progress = job.states.read_record("step-00000003").progress
    ended, again = run_job(job, progress)
    assert equal(learned, again)
    assert [r.loss for r in begun + ended] == [r.loss for r in whole]
    assert whole[-1].loss != whole[0].loss
    assert progress.step == STEPS


@pytest.mark.parametrize("place", ["_accumulate", "step_if"])
def test_out_of_memory_costs_no_complete_step(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, learned = run_job(make_job(tmp_path / "a", "mixer-mse", steps=STEPS))
    progress = Progress()

    def or_out_of_memory(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            found = work(*given)
            if progress.step == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        return run

    job = make_job(tmp_path / "b", "mixer-mse", steps=STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, place, or_out_of_memory(getattr(trainer, place)))
        with pytest.raises(torch.OutOfMemoryError):
            run_job(job, progress)
    if place == "step_if":
        # Some parameters may have been updated, and others not.
        assert job.states.steps() == []
        return
    assert job.states.steps() == [3]
    again = make_job(tmp_path / "b", "mixer-mse", steps=STEPS)
    _, resumed = run_job(again, again.states.read_record("step-00000003").progress)
    assert equal(learned, resumed)


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
def test_only_trainable_parameters_change(loss: str, tmp_path: Path) -> None:
    job = make_job(tmp_path, loss, steps=STEPS)
    before = {n: p.detach().clone() for n, p in job.pair.student.named_parameters()}
    results, _ = run_job(job)
    for name, parameter in job.pair.student.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in job.pair.trainable), name
    assert results[-1].learning_rate < results[2].learning_rate == job.stage.lr


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
@pytest.mark.parametrize("packed", [False, True])
def test_accumulation_equals_one_batch(loss: str, packed: bool, tmp_path: Path) -> None:
    """One step over 8 samples equals four micro batches of unequal length, padded or packed."""
    shape = {"steps": 3, "batch_size": 8, "dtype": torch.float64}
    whole, learned = run_job(make_job(tmp_path / "a", loss, **shape))
    job = make_job(tmp_path / "b", loss, accumulation=4, packed=packed, **shape)
    parts, again = run_job(job)
    for one, two in zip(whole, parts, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-8)
        assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-8)
    difference = max(float((learned[n] - again[n]).abs().max()) for n in learned)
    assert difference < 1e-8


def test_a_step_without_a_finite_loss_is_skipped(tmp_path: Path) -> None:
    def spoil(batches: StepBatches) -> StepBatches:
        return poisoned(batches) if batches.step == 2 else batches

    job = make_job(tmp_path, "mixer-mse", steps=4)
    seen: list[dict[str, Tensor]] = []
    results: list[StepResult] = []
    job = replace(job, loader=ChangedLoader(job.loader, spoil))

    def report(result: StepResult) -> None:
        results.append(result)
        seen.append({n: p.detach().clone() for n, p in job.pair.trainable_parameters().items()})

    with explosive(job):
        progress = train(job, Progress(), report, lambda: False)
    assert "loss is nan in layer 0" in str(results[2].skipped)
    assert equal(seen[1], seen[2])
    assert not equal(seen[2], seen[3])
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (1, 0)


def test_several_skipped_steps_in_a_row_stop_the_stage(tmp_path: Path) -> None:
    job = make_job(tmp_path, "mixer-mse", steps=20)
    job = replace(job, loader=ChangedLoader(job.loader, poisoned))
    with explosive(job), pytest.raises(MmmambaError) as caught:
        run_job(job)
    assert "step 5" in str(caught.value)
    assert "layer 0" in str(caught.value)
    assert "row 0" in str(caught.value)


def test_too_many_bad_samples_stop_the_stage(tmp_path: Path) -> None:
    def spoil(batches: StepBatches) -> StepBatches:
        return replace(batches, bad=(BadSample("set.jsonl:3", "no such image"),))

    job = make_job(tmp_path, "mixer-mse", steps=200)
    job = replace(job, loader=ChangedLoader(job.loader, spoil), max_bad_share=0.1)
    with pytest.raises(DataError, match=r"set\.jsonl:3: no such image"):
        run_job(job)
    patient = make_job(tmp_path / "b", "mixer-mse", steps=30)
    patient = replace(patient, loader=ChangedLoader(patient.loader, spoil), max_bad_share=0.5)
    progress = Progress()
    run_job(patient, progress)
    assert progress.bad_samples == 30


def test_the_best_student_is_kept(tmp_path: Path) -> None:
    job = make_job(tmp_path, "mixer-mse", steps=4, evaluate_every=1, lr=1.0)
    held_out = RandomLoader(90, batch_size=4, seed=7)
    job = replace(job, held_out=held_out)
    progress = Progress()
    results, _ = run_job(job, progress)
    losses = [r.held_out.loss for r in results if r.held_out]
    assert len(losses) == 4
    assert progress.best_loss == min(losses)
    assert progress.best_step == 1 + losses.index(min(losses))
    last = {n: p.detach().clone() for n, p in job.pair.trainable_parameters().items()}
    name = job.states.best_name(progress.best_step)
    job.states.load(name, job.pair.trainable_parameters(), None)
    best = {n: p.detach().clone() for n, p in job.pair.trainable_parameters().items()}
    assert equal(best, last) == (progress.best_step == 4)
    assert 0 <= results[0].held_out.agreement <= 1
    assert results[0].held_out.student_nll > 0


def test_the_best_student_of_a_saved_state_is_kept(tmp_path: Path) -> None:
    """Killed after a better student but before the next state, the older best still exists."""

    def job() -> TrainingJob:
        made = make_job(tmp_path, "mixer-mse", steps=6, evaluate_every=1, save_every=3)
        return replace(made, held_out=RandomLoader(90, batch_size=4, seed=7))

    killed, progress = job(), Progress()

    def report(result: StepResult) -> None:
        if result.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(killed, progress, report, lambda: False)
    saved = killed.states.read_record("step-00000003").progress
    assert saved.best_step < progress.best_step == 5
    assert (killed.states.folder / killed.states.best_name(saved.best_step)).is_dir()
    again = replace(saved)
    run_job(job(), again)
    names = sorted(p.name for p in killed.states.folder.iterdir())
    assert names == [killed.states.best_name(again.best_step), "step-00000006"]


def test_an_infinite_term_is_named() -> None:
    values = StepValues(torch.tensor([1.0, float("inf"), 3.0], dtype=torch.float64), 1.0, None)
    terms = ("layer 0", "layer 2", "layer 3")
    assert values.find_problem(terms, float("inf"), None) == "the loss is inf in layer 2"


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """It is found before clipping, which makes all gradients NaN."""
    job = make_job(tmp_path, "mixer-mse", steps=1)
    parameters = job.pair.trainable_parameters()
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    victim = list(parameters)[3]
    parameters[victim].grad.view(-1)[1] = float("inf")
    ones = torch.ones(4, dtype=torch.float64)
    values = DeviceValues(ones, ones, parameters, clip=5.0)
    assert not bool(values.is_finite)
    read = values.read()
    assert read.nonfinite == victim
    reason = read.find_problem(job.objective.terms, 4.0, read.nonfinite)
    assert reason == f"the gradient of {victim} is not finite"
    assert read.find_problem(job.objective.terms, 4.0, None) == "the gradient norm is inf"


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    run_job(make_job(tmp_path, "mixer-mse", steps=4), stop_at=2)
    job = make_job(tmp_path, "mixer-mse", steps=4)
    (victim,) = job.states.path(2).glob("*.distcp")
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(RunError, match="step-00000002 is damaged: it cannot be read"):
        run_job(job, Progress(step=2))


class EnumsByGetattr(pickle.Pickler):
    """Pickles members of enums as Python before 3.11.4 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_a_state_of_an_older_python_is_read(tmp_path: Path) -> None:
    run_job(make_job(tmp_path, "mixer-mse", steps=4), stop_at=2)
    job = make_job(tmp_path, "mixer-mse", steps=4)
    index = job.states.path(2) / ".metadata"
    written = io.BytesIO()
    EnumsByGetattr(written).dump(pickle.loads(index.read_bytes()))
    assert b"getattr" in written.getvalue()
    index.write_bytes(written.getvalue())
    run_job(job, Progress(step=2))


def test_a_half_written_state_is_ignored_and_named(tmp_path: Path) -> None:
    run_job(make_job(tmp_path, "mixer-mse", steps=4), stop_at=2)
    job = make_job(tmp_path, "mixer-mse", steps=4)
    job.states.path(3).mkdir()
    (job.states.folder / ".step-00000004.partial-host-1").mkdir()
    assert job.states.steps() == [2]
    assert job.states.incomplete() == [".step-00000004.partial-host-1", "step-00000003"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.55]),
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules(kind: str, expected: list[float], tmp_path: Path) -> None:
    schedule = Schedule(kind=kind, warmup=0.2, decay=0.2, final=0.1)
    shares = [lr_factor(schedule, step, 10) for step in range(10)]
    assert shares == pytest.approx(expected)
    stage = make_job(tmp_path, "kl", steps=10).stage
    assert learning_rate(stage, 9) == pytest.approx(stage.lr * lr_factor(stage.schedule, 9, 10))


def test_decay_and_rates_of_the_optimiser(tmp_path: Path) -> None:
    """Matrices decay; biases, norms, A_log and the like do not."""
    job = make_job(tmp_path, "kl", steps=4, plan="mdkg", tile_taps=True)
    parameters = job.pair.trainable_parameters()
    optimiser = build_optimiser(job.stage, parameters)
    names = {id(p): n for n, p in parameters.items()}
    decays = {
        names[id(p)].partition(".mixer.")[2]: group["weight_decay"]
        for group in optimiser.param_groups
        for p in group["params"]
    }
    free = {"A_log", "dt_bias", "beta_bias", "decay_bias", "tile_taps"}
    free |= {"conv1d.bias", "g_norm.weight"}
    assert {name for name, decay in decays.items() if decay == 0} == free
    assert set(decays.values()) == {0.0, 0.05}
    assert "q_proj.weight" in decays
    assert optimiser.param_groups[0]["betas"] == (0.9, 0.999)


def test_cosine_falls_from_the_peak_to_its_share() -> None:
    schedule = Schedule(kind="cosine", warmup=0.1, final=0.1)
    shares = [lr_factor(schedule, step, 100) for step in range(100)]
    assert shares[9] == shares[10] == 1
    assert all(a > b for a, b in pairwise(shares[10:]))
    assert shares[55] == pytest.approx(0.55)
    assert 0.1 < shares[99] < 0.11


def test_cpu_threads_are_limited_on_a_gpu_only() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with limit_cpu_threads(torch.device("cpu")):
            assert torch.get_num_threads() == 4
        with pytest.raises(ValueError, match="inside"), limit_cpu_threads(torch.device("cuda")):
            assert torch.get_num_threads() == 2
            raise ValueError("inside")
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
