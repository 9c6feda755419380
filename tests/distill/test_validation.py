"""Held-out metrics: means over the set, unreadable samples, the best student."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_distillation import ChangedLoader, RandomLoader, batch_of, make_job, run_job
from torch import Tensor

from mmmamba_cli.data import IGNORE_INDEX, BadSample, StepBatches
from mmmamba_cli.distill import trainer, validation
from mmmamba_cli.distill.metrics import metrics_row, plot_losses, read_metrics
from mmmamba_cli.distill.trainer import TrainingJob
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distill.validation import HeldOutMetrics, evaluate_held_out
from mmmamba_cli.errors import DataError

BAD = BadSample("set.jsonl:3", "no such image")


class Rows:
    """A loader of steps given as lists of rows of token ids."""

    def __init__(self, steps: list[list[Tensor]], bad: tuple[BadSample, ...] = ()):
        self.rows, self.bad = steps, bad
        self.steps_per_pass = len(steps)

    def unreadable(self) -> None: ...

    def steps(self, first: int, stop: int) -> Iterable[StepBatches]:
        for step in range(first, stop):
            micro = tuple(batch_of(row[None]) for row in self.rows[step])
            yield StepBatches(step, micro, self.bad if step == 0 else (), len(micro))


def held_out_metrics(
    job: TrainingJob, steps: list[list[Tensor]], bad: tuple[BadSample, ...] = ()
) -> HeldOutMetrics:
    source = Rows(steps, bad)
    return evaluate_held_out(
        job.pair, job.objective, source.steps(0, source.steps_per_pass), job.world
    )


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
def test_a_short_last_step_is_weighted_by_tokens(loss: str, tmp_path: Path) -> None:
    """Seven rows of unequal length in steps of three give the metrics of one step."""
    job = make_job(tmp_path, loss, steps=1, dtype=torch.float64)
    rows = RandomLoader(90, batch_size=7, seed=3).samples(0)
    whole = held_out_metrics(job, [rows])
    parts = held_out_metrics(job, [rows[:3], rows[3:6], rows[6:]])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-10)
    assert parts.agreement == pytest.approx(whole.agreement, rel=1e-10)
    assert parts.student_nll == pytest.approx(whole.student_nll, rel=1e-6)
    assert (parts.tokens, parts.samples) == (sum(map(len, rows)), 7)
    without_the_last = held_out_metrics(job, [rows[:3], rows[3:6]])
    assert without_the_last.loss != pytest.approx(whole.loss, rel=1e-3)


def test_the_loop_evaluates_a_full_pass(tmp_path: Path) -> None:
    job = make_job(tmp_path, "mixer-mse", steps=2)
    rows = RandomLoader(90, batch_size=5, seed=3).samples(0)
    results, _ = run_job(replace(job, held_out=Rows([rows[:4], rows[4:]])))
    assert results[-1].held_out is not None
    assert results[-1].held_out.samples == 5
    assert results[-1].held_out.tokens == sum(map(len, rows))


def test_unreadable_samples_are_listed_and_counted(tmp_path: Path) -> None:
    job = make_job(tmp_path, "mixer-mse", steps=2)
    rows = RandomLoader(90, batch_size=3, seed=3).samples(0)
    progress = Progress()
    results, _ = run_job(replace(job, held_out=Rows([rows], (BAD,))), progress)
    found = results[-1].held_out
    assert found is not None
    assert found.bad == ("set.jsonl:3: no such image",)
    assert (progress.held_out["samples"], progress.held_out["bad_samples"]) == (3, 1)
    assert metrics_row(results[-1])["held_out/bad_samples"] == ["set.jsonl:3: no such image"]


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
def test_a_set_without_a_readable_sample_is_refused(loss: str, tmp_path: Path) -> None:
    job = make_job(tmp_path, loss, steps=1)
    with pytest.raises(DataError, match=r"none of the 1 held-out samples can be read; .*image"):
        held_out_metrics(job, [[]], (BAD,))


def test_an_answer_loss_needs_answers(tmp_path: Path) -> None:
    job = make_job(tmp_path, "kl", steps=1)
    settings = replace(job.objective, settings=job.stage.kl.model_copy(update={"mask": "answer"}))
    batch = batch_of(torch.tensor([[8, 9, 10]]), labels=torch.full((1, 3), IGNORE_INDEX))
    with pytest.raises(DataError, match="held-out loss kl has nothing to be a mean of: none of"):
        evaluate_held_out(job.pair, settings, [StepBatches(0, (batch,), (), 1)], job.world)


def test_training_does_not_begin_with_an_unreadable_set(tmp_path: Path) -> None:
    job = make_job(tmp_path, "mixer-mse", steps=3)
    source = Rows([[]], (BAD,))
    source.unreadable = lambda: [BAD, BAD]  # type: ignore[assignment, return-value]
    with pytest.raises(DataError, match="none of the 2 held-out samples can be read"):
        run_job(replace(job, held_out=source))
    assert job.states.steps() == []


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_a_first_loss_that_is_not_finite_is_not_the_best(
    first: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([first, 3.0, 2.0, first, 2.5])

    def scripted(*_: Any) -> HeldOutMetrics:
        return HeldOutMetrics(next(losses), 0.5, None, None, 10, 2)

    monkeypatch.setattr(trainer, "evaluate_held_out", scripted)
    job = make_job(tmp_path, "mixer-mse", steps=5, evaluate_every=1)
    progress = Progress()
    run_job(replace(job, held_out=RandomLoader(90, batch_size=4)), progress)
    assert (progress.best_step, progress.best_loss) == (3, 2.0)
    assert (job.states.folder / job.states.best_name(3)).is_dir()


def test_a_saved_best_that_is_not_finite_is_replaced() -> None:
    assert validation.is_better(5.0, math.nan)
    assert validation.is_better(5.0, None)
    assert not validation.is_better(math.nan, 5.0)
    assert not validation.is_better(math.nan, None)


def test_a_state_holds_no_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN; strict readers of a manifest would fail."""
    monkeypatch.setattr(
        trainer, "evaluate_held_out", lambda *_: HeldOutMetrics(math.nan, 0.5, None, None, 10, 2)
    )
    job = make_job(tmp_path, "mixer-mse", steps=1)
    run_job(replace(job, held_out=RandomLoader(90, batch_size=4)))
    text = (job.states.path(1) / "state.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["progress"]["held_out"]["loss"] == "nan"


def unreadable_step(number: int) -> Any:
    """A change that makes all samples of step `number` unreadable."""
    nothing = torch.zeros(1, 1, dtype=torch.long)
    blank = batch_of(nothing, mask=torch.zeros(1, 1, dtype=torch.bool), samples=0)

    def spoil(batches: StepBatches) -> StepBatches:
        if batches.step != number:
            return batches
        bad = tuple(replace(BAD, name=f"set.jsonl:{line}") for line in range(batches.num_planned))
        return replace(batches, micro_batches=(blank,) * len(batches.micro_batches), bad=bad)

    return spoil


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
def test_a_step_without_a_readable_sample_is_skipped(loss: str, tmp_path: Path) -> None:
    """Weights and moments stay unchanged, and the metrics row gives the reason and a NaN loss."""
    seen: list[dict[str, Tensor]] = []

    def job(name: str) -> TrainingJob:
        made = make_job(tmp_path / name, loss, steps=5, save_every=1)
        return replace(
            made, max_bad_share=1.0, loader=ChangedLoader(made.loader, unreadable_step(2))
        )

    whole, progress = job("a"), Progress()
    rows = []

    def report(result: Any) -> None:
        rows.append(metrics_row(result))
        seen.append({n: p.detach().clone() for n, p in whole.pair.trainable_parameters().items()})

    trainer.train(whole, progress, report, lambda: False)
    assert rows[2]["skipped"] == "none of its 4 samples could be read"
    assert len(rows[2]["bad_samples"]) == 4
    assert math.isnan(rows[2]["loss"])
    assert all(math.isnan(value) for value in rows[2]["terms"].values())
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert not all(torch.equal(seen[2][name], seen[3][name]) for name in seen[1])
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (1, 0)
    # Stopping before the skipped step and resuming gives the same bits.
    run_job(job("b"), stop_at=2)
    again = job("b")
    resumed = again.states.read_record("step-00000002").progress
    _, learned = run_job(again, resumed)
    assert all(torch.equal(learned[name], seen[-1][name]) for name in learned)
    assert resumed.skipped_steps == 1


def test_moments_are_unchanged_by_a_skipped_step(tmp_path: Path) -> None:
    kept = []
    for stop in (2, 3):
        job = make_job(tmp_path / str(stop), "mixer-mse", steps=4)
        job = replace(job, max_bad_share=1.0, loader=ChangedLoader(job.loader, unreadable_step(2)))
        run_job(job, Progress(), stop_at=stop)
        parameters = job.pair.trainable_parameters()
        optimiser = trainer.build_optimiser(job.stage, parameters)
        job.states.load(f"step-{stop:08d}", parameters, optimiser)
        kept.append({name: optimiser.state[p] for name, p in parameters.items()})
    for name, before in kept[0].items():
        assert all(torch.equal(before[key], kept[1][name][key]) for key in before), name
        assert before["step"] == 2


def test_max_bad_share_limits_unreadable_steps(tmp_path: Path) -> None:
    """With nine of ten steps unreadable, a share of 0.95 passes and one of 0.5 fails."""

    def job(name: str, share: float) -> TrainingJob:
        made = make_job(tmp_path / name, "mixer-mse", steps=50)

        def most(batches: StepBatches) -> StepBatches:
            return batches if batches.step % 10 == 9 else unreadable_step(batches.step)(batches)

        return replace(made, max_bad_share=share, loader=ChangedLoader(made.loader, most))

    progress = Progress()
    run_job(job("a", 0.95), progress)
    assert progress.skipped_steps == 45
    with pytest.raises(DataError, match=r"more than data\.max_bad_share = 0\.5"):
        run_job(job("b", 0.5))


def test_a_stage_of_skipped_steps_makes_no_product(tmp_path: Path) -> None:
    job = make_job(tmp_path, "mixer-mse", steps=3)

    def all_of_them(batches: StepBatches) -> StepBatches:
        return unreadable_step(batches.step)(batches)

    job = replace(job, max_bad_share=1.0, loader=ChangedLoader(job.loader, all_of_them))
    with pytest.raises(
        trainer.MmmambaError, match="learned nothing: all of its 3 steps were skipped"
    ):
        run_job(job)


def test_steps_without_a_scored_token_end_the_stage(tmp_path: Path) -> None:
    """Readable samples without answers give an answer loss no unit."""
    job = make_job(tmp_path, "kl", steps=20)
    objective = replace(job.objective, settings=job.stage.kl.model_copy(update={"mask": "answer"}))

    def unanswered(batches: StepBatches) -> StepBatches:
        micro = [
            replace(m, labels=torch.full_like(m.labels, IGNORE_INDEX))
            for m in batches.micro_batches
        ]
        return replace(batches, micro_batches=tuple(micro))

    job = replace(job, objective=objective, loader=ChangedLoader(job.loader, unanswered))
    expected = "step 5: 5 steps in a row were skipped; none of its 4 samples has a token that"
    with pytest.raises(trainer.MmmambaError, match=expected):
        run_job(job)


def test_losses_that_are_not_finite_are_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    terms = {"layer 0": "nan", "layer 1": math.inf, "layer 2": 1.0}
    rows = [
        {"step": 1, "loss": math.inf, "terms": terms, "held_out/loss": "nan"},
        {"step": 2, "loss": "nan", "terms": terms, "held_out/loss": "inf"},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_losses(tmp_path) is not None


def test_bad_samples_are_gathered_from_all_processes() -> None:
    class Two:
        """Process 0 of two; the other one found one more bad sample."""

        is_main = True

        def all_gather(self, own: list[BadSample]) -> list[BadSample]:
            return [*own, BadSample("set.jsonl:9", "is damaged", seen_by_all=False)]

    named = validation.gather_bad_samples([BAD, replace(BAD, seen_by_all=False)], Two())  # type: ignore[arg-type]
    # A sample that a step has twice is named once.
    assert named == ["set.jsonl:3: no such image", "set.jsonl:9: is damaged"]
    assert not list(read_metrics(Path("there is no such file")))
