"""`accumulation: auto`: the sizes of micro batches, and the same training for any of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IMAGE_ID
from small_distillation import RowLoader, make_job, run_job
from torch import Tensor

from mmmamba_cli.data import Accumulation, ColumnLimit
from mmmamba_cli.distill.micro_batches import max_columns, rows_at_most, stage_accumulation
from mmmamba_cli.recipe import Stage, load_recipe

STEPS, BATCH_SIZE = 3, 6
LIMIT = ColumnLimit(32)


def stage_of(loss: str, accumulation: int | str = "auto", batch_size: int = 64) -> Stage:
    return Stage(
        name="s", learns="new", loss=loss, inputs="student" if loss == "kl" else "teacher", steps=1,
        batch_size=batch_size, accumulation=accumulation, lr=1e-3,
    )  # fmt: skip


def test_limits_by_loss() -> None:
    losses = ("mixer-mse", "hidden-alignment", "kl", "matrix-orientation")
    stages = [stage_of(loss) for loss in losses]
    assert [max_columns(stage) for stage in stages] == [32_768, 32_768, 16_384, 8_192]
    assert stage_accumulation(stages[2]) == ColumnLimit(16_384)
    assert stage_accumulation(stage_of("kl", 4)) == 4


@pytest.mark.parametrize(
    ("loss", "accumulation", "length", "processes", "rows"),
    [
        ("mixer-mse", "auto", 8192, 1, 4),
        ("kl", "auto", 8192, 1, 2),
        # A longer row is alone, and there are no more rows than a process has.
        ("kl", "auto", 32_768, 1, 1),
        ("kl", "auto", 1024, 1, 16),
        ("kl", "auto", 1024, 16, 4),
        ("kl", 16, 8192, 1, 4),
        ("kl", 16, 8192, 8, 1),
        ("mixer-mse", 1, 8192, 1, 64),
    ],
)
def test_rows_of_full_length(
    loss: str, accumulation: int | str, length: int, processes: int, rows: int
) -> None:
    assert rows_at_most(stage_of(loss, accumulation), length, processes) == rows


def test_recipes_of_hovle() -> None:
    for name in ("linear", "hybrid", "linear-long", "hybrid-long"):
        stages = load_recipe(f"mmmamba-{name}").stages
        assert {stage.accumulation for stage in stages} == {"auto"}
    assert {stage.accumulation for stage in load_recipe("gated-delta-linear").stages} == {"auto"}


def make(folder: Path, loss: str, batching: str, number: Accumulation, dtype: torch.dtype) -> Any:
    """A job whose loader has micro batches as `number` says."""
    job = make_job(folder, loss, steps=STEPS, batch_size=BATCH_SIZE, dtype=dtype)
    return replace(job, loader=RowLoader(IMAGE_ID, BATCH_SIZE, number, batching=batching))


def sums_and_gradients(job: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss and gradients of the first step, and its number of micro batches."""
    (step,) = job.loader.steps(0, 1)
    units = sum(job.objective.count_units(job.pair, micro) for micro in step.micro_batches)
    weights = job.objective.term_weights(units)
    job.pair.student.train()
    sums = sum(job.objective.loss_sums(job.pair, micro, weights) for micro in step.micro_batches)
    learning = job.pair.trainable_parameters()
    gradients = {name: p.grad for name, p in learning.items() if p.grad is not None}
    assert isinstance(sums, Tensor)
    return sums, gradients, len(step.micro_batches)


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Norm of the difference of all tensors, as a share of their norm."""
    assert one.keys() == two.keys()
    first, second = (torch.cat([x[name].flatten() for name in one]) for x in (one, two))
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
@pytest.mark.parametrize("batching", ["padded", "packed", "bucketed"])
def test_losses_and_gradients_of_one_some_and_many_micro_batches(
    loss: str, batching: str, tmp_path: Path
) -> None:
    parts: tuple[Accumulation, ...] = (1, LIMIT, BATCH_SIZE)
    one, auto, many = (
        sums_and_gradients(make(tmp_path, loss, batching, number, torch.float64))
        for number in parts
    )
    assert one[2] < auto[2] < many[2]
    for sums, gradients, _ in (one, many):
        assert torch.allclose(sums, auto[0], rtol=1e-11, atol=0)
        assert distance(gradients, auto[1]) < 1e-11


def test_training_with_numbers_that_differ_from_step_to_step(tmp_path: Path) -> None:
    parts: tuple[Accumulation, ...] = (1, LIMIT)
    whole, auto = (
        make(tmp_path / str(i), "kl", "bucketed", number, torch.float64)
        for i, number in enumerate(parts)
    )
    assert [len(step.micro_batches) for step in auto.loader.steps(0, STEPS)] == [3, 2, 3]
    (expected, weights), (results, learned) = run_job(whole), run_job(auto)
    for first, second in zip(expected, results, strict=True):
        assert second.loss == pytest.approx(first.loss, rel=1e-10)
        assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-10)
    # Steps amplify rounding.
    assert distance(weights, learned) < 1e-8
