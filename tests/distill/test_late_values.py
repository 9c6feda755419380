"""Losses and norms read one step late: the same bits, rows and errors, without waits."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IMAGE_ID
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
from mmmamba_cli.distill import step_values, trainer
from mmmamba_cli.distill.metrics import metrics_row, nonfinite_as_text
from mmmamba_cli.distill.optimiser import build_optimiser, clip_gradients, step_if
from mmmamba_cli.distill.trainer import StepResult, TrainingJob, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.errors import DataError, MmmambaError

STEPS = 7
# Functions and calls that read tensors of the host, and which.
HOST_READS = {
    ("_accumulate", "__bool__"): "units",
    ("_step", "__bool__"): "units",
    ("<genexpr>", "__int__"): "counts",
    ("any", "__bool__"): "should_stop",
    ("all_reduce_sum", "cpu"): "counts, units and should_stop",
    ("loss_sums", "tolist"): "term weights",
    ("count_units", "__int__"): "masks of CPU batches",
    ("count_stack_tokens", "__int__"): "masks of CPU batches",
    ("finish", "tolist"): "which parameters have a gradient",
}


@pytest.fixture(params=[0, 1])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(trainer, "steps_read_late", lambda device: request.param)
    return int(request.param)


def spoiled(batches: StepBatches) -> StepBatches:
    """Step 2 has no finite loss, step 4 no readable sample."""
    if batches.step == 2:
        return poisoned(batches)
    if batches.step != 4:
        return batches
    loader = RandomLoader(IMAGE_ID, 4, unreadable_steps=(4,))
    return next(iter(loader.steps(4, 5)))


def spoiled_job(folder: Path, loss: str) -> TrainingJob:
    job = make_job(folder, loss, steps=STEPS, plan="mdwk", evaluate_every=3, save_every=4, lr=3e-2)
    held_out = RandomLoader(IMAGE_ID, batch_size=4, seed=7)
    loader = ChangedLoader(job.loader, spoiled)
    return replace(job, loader=loader, held_out=held_out, max_bad_share=0.5)


def rows_of(job: TrainingJob) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Any]]:
    """Rows of metrics.jsonl and progress without times, and the learned parameters."""
    progress = Progress()
    with explosive(job):
        results, learned = run_job(job, progress)
    rows = [metrics_row(result) for result in results]
    for row in rows:
        del row["tokens_per_second"]
    numbers = asdict(progress)
    del numbers["seconds"]
    # NaN compares unequal.
    return [nonfinite_as_text(row) for row in rows], learned, numbers


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
@pytest.mark.parametrize("fused", [False, True])
def test_late_reads_change_no_bit(
    loss: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused step, taken on the device if the loss is finite, equals one that the host takes."""
    monkeypatch.setattr(trainer, "build_optimiser", partial(build_optimiser, fused=fused))

    def decided_by_host(optimiser: torch.optim.AdamW, condition: Tensor) -> None:
        if bool(condition):
            optimiser.step()

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step_if", decided_by_host)
        rows, learned, progress = rows_of(spoiled_job(tmp_path / "a", loss))
    monkeypatch.setattr(trainer, "steps_read_late", lambda device: 1)
    late_rows, again, late_progress = rows_of(spoiled_job(tmp_path / "b", loss))
    assert late_rows == rows
    assert equal(learned, again)
    assert late_progress == progress
    assert [row["step"] for row in rows if "skipped" in row] == [3, 5]
    is_clipped = [row["gradient_norm"] > 5.0 for row in rows if "skipped" not in row]
    assert any(is_clipped) == (loss == "kl")


def test_a_step_is_read_when_the_next_one_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before an evaluation or a saved state; each step is read once, at the end."""
    events: list[str] = []

    def recorded(name: str, call: Callable[..., Any], text: Callable[..., str]) -> None:
        def run(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            events.append(text(*arguments))
            return result

        monkeypatch.setattr(trainer, name, run)

    recorded("step_if", trainer.step_if, lambda *_: "queue")
    recorded("read_step", trainer.read_step, lambda queued, *_: f"read {queued.step}")
    recorded("_save", trainer._save, lambda job, state: f"save {state.progress.step}")
    monkeypatch.setattr(trainer, "steps_read_late", lambda device: 1)
    results, _ = run_job(make_job(tmp_path, "mixer-mse", steps=5, save_every=3))
    assert events == [
        "queue", "queue", "read 1", "queue", "read 2", "read 3", "save 3",
        "queue", "queue", "read 4", "read 5", "save 5",
    ]  # fmt: skip
    assert [result.step for result in results] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
def test_nothing_of_the_device_is_read_but_the_copy_of_a_step(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[tuple[str, str]] = Counter()
    copies: list[int] = []

    def counted(name: str) -> None:
        call = getattr(Tensor, name)

        def run(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            frame = sys._getframe(1)
            if "/mmmamba_cli/di" in frame.f_code.co_filename:
                reads[(frame.f_code.co_name, name)] += 1
            return call(tensor, *arguments, **options)

        monkeypatch.setattr(Tensor, name, run)

    class Copy(step_values.HostCopy):
        def read(self) -> Tensor:
            copies.append(sum(reads.values()))
            return super().read()

    monkeypatch.setattr(trainer, "build_optimiser", partial(build_optimiser, fused=True))
    monkeypatch.setattr(trainer, "steps_read_late", lambda device: 1)
    monkeypatch.setattr(step_values, "HostCopy", Copy)
    # Packed rows without padding: all columns are scored.
    job = make_job(tmp_path, loss, steps=4, packed=True)
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
        counted(name)
    train(job, Progress(), lambda result: None, lambda: False)
    after_copies = {("read", "item"), ("read", "tolist"), ("read", "nonzero")}
    after_copies |= {("read_step", "__float__"), ("read_step", "tolist")}
    assert len(copies) == 4
    assert set(reads) - after_copies <= set(HOST_READS), reads
    # The patches work.
    assert reads[("_accumulate", "__bool__")] == 4


def test_the_fifth_skipped_step_is_named(late: int, tmp_path: Path) -> None:
    job = make_job(tmp_path, "mixer-mse", steps=20)
    job = replace(job, loader=ChangedLoader(job.loader, poisoned))
    results: list[StepResult] = []
    with explosive(job), pytest.raises(MmmambaError, match="stopped at step 5: 5 steps in a row"):
        train(job, Progress(), results.append, lambda: False)
    assert [result.step for result in results] == [1, 2, 3, 4]
    assert job.states.steps() == []


def test_the_steps_before_bad_data_are_reported(late: int, tmp_path: Path) -> None:
    def spoil(batches: StepBatches) -> StepBatches:
        bad = tuple(BadSample(f"set:{i}", "is damaged") for i in range(200))
        return replace(batches, bad=bad) if batches.step == 3 else batches

    job = make_job(tmp_path, "mixer-mse", steps=20)
    job = replace(job, loader=ChangedLoader(job.loader, spoil), max_bad_share=0.1)
    results: list[StepResult] = []
    with pytest.raises(DataError, match="set:0: is damaged"):
        train(job, Progress(), results.append, lambda: False)
    assert [result.step for result in results] == [1, 2, 3]


def test_stopping_and_resuming(late: int, tmp_path: Path) -> None:
    whole, learned = run_job(make_job(tmp_path / "a", "mixer-mse", steps=6))
    begun, _ = run_job(make_job(tmp_path / "b", "mixer-mse", steps=6), stop_at=3)
    job = make_job(tmp_path / "b", "mixer-mse", steps=6)
    saved = job.states.read_record("step-00000003").progress
    assert saved.seconds > 0
    ended, again = run_job(job, saved)
    assert equal(learned, again)
    assert [r.loss for r in begun + ended] == [r.loss for r in whole]


def test_a_clipped_norm_has_torch_bits() -> None:
    """Clipping without a read equals `if norm > limit: clip`, also just below the limit."""
    for scale in (0.01, 4.9999999, 5.0, 5.0000005, 80.0):
        parameters = {}
        for name, seed in (("a", 0), ("b", 1)):
            parameter = torch.nn.Parameter(torch.zeros(7))
            parameter.grad = torch.randn(7, generator=torch.Generator().manual_seed(seed))
            parameters[name] = parameter
        before = torch.nn.utils.get_total_norm([p.grad for p in parameters.values()])
        for parameter in parameters.values():
            parameter.grad *= scale / before
        copies = [p.grad.clone() for p in parameters.values()]
        norm = torch.stack([torch.nn.utils.get_total_norm(copies)]).norm()
        if float(norm) > 5.0:
            factor = torch.clamp(5.0 / (norm + 1e-6), max=1.0)
            copies = [copy * factor for copy in copies]
        assert float(clip_gradients(parameters, 5.0)) == float(norm)
        for parameter, copy in zip(parameters.values(), copies, strict=True):
            assert torch.equal(parameter.grad, copy)


@pytest.mark.parametrize("fused", [False, True])
def test_an_untaken_step_changes_nothing(fused: bool, tmp_path: Path) -> None:
    job = make_job(tmp_path, "mixer-mse", steps=1)
    parameters = job.pair.trainable_parameters()
    optimiser = build_optimiser(job.stage, parameters, fused=fused)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    step_if(optimiser, torch.tensor(False))
    assert equal(before, {name: parameter.detach() for name, parameter in parameters.items()})
    for state in optimiser.state.values():
        assert not any(bool(value.any()) for value in state.values())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    step_if(optimiser, torch.tensor(True))
    assert all(float(state["step"]) == 1 for state in optimiser.state.values())
    assert not any(torch.equal(before[n], p.detach()) for n, p in parameters.items())
