"""What each of several processes holds, and the fused optimiser."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from small_distillation import make_job
from torch import Tensor

from mmmamba_cli.distill import parallelize, trainer
from mmmamba_cli.distill.optimiser import build_optimiser
from mmmamba_cli.distill.parallelize import plan_parallel
from mmmamba_cli.distill.trainer import Stopped, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import World


@pytest.mark.parametrize(
    ("choice", "size", "free", "mode", "keep_gathered"),
    [
        # Free memory of this machine in units of the weights; each process may take half of its
        # part. Replicas need 3 units, a gathered step 2 + 4 / size.
        ("auto", 2, 13, "replicate", True),
        ("auto", 2, 11, "shard", False),
        ("auto", 8, 47, "shard", True),
        ("auto", 8, 39, "shard", False),
        ("auto", 2, None, "replicate", True),
        ("replicate", 2, 1, "replicate", True),
        ("shard", 2, 100, "shard", True),
        ("shard", 2, 1, "shard", False),
    ],
)
def test_plan(
    choice: str,
    size: int,
    free: float | None,
    mode: str,
    keep_gathered: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = make_job(tmp_path, "mixer-mse", steps=1).pair
    weights = sum(parameter.nbytes for parameter in pair.trainable_parameters().values())
    left = None if free is None else round(free * weights)
    monkeypatch.setattr(parallelize, "free_cpu_memory", lambda: left)
    monkeypatch.setattr(World, "all_gather", lambda self, values: list(values) * self.size)
    world = World(torch.device("cpu"), size=size, local_size=size)
    plan = plan_parallel(choice, pair, world)
    assert (plan.mode, plan.keep_gathered) == (mode, keep_gathered)
    assert {"replicate": "replicated", "shard": "sharded"}[mode] in plan.reason
    assert ("memory is short" in plan.reason) == (mode == "shard" and not keep_gathered)


def test_a_single_process_decides_nothing(tmp_path: Path) -> None:
    pair = make_job(tmp_path, "mixer-mse", steps=1).pair
    assert plan_parallel("shard", pair, World(torch.device("cpu"))).reason == ""


def trained(folder: Path, until: int) -> dict[str, Tensor]:
    """The weights after training from the newest state in `folder` to step `until` of 6."""
    job = make_job(folder, "mixer-mse", steps=6, lr=1e-3, dtype=torch.float64)
    progress = Progress()
    if steps := job.states.steps():
        progress = job.states.read_record(job.states.path(steps[-1]).name).progress
    with suppress(Stopped):
        train(job, progress, lambda result: None, lambda: progress.step == until)
    return {name: p.detach() for name, p in job.pair.trainable_parameters().items()}


def test_fused_steps_resume_states_of_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(tmp_path / "plain", 6)
    trained(tmp_path / "both", 3)
    monkeypatch.setattr(trainer, "build_optimiser", partial(build_optimiser, fused=True))
    fused = trained(tmp_path / "both", 6)
    # Other bits, so that the fused kernel ran.
    assert any(not torch.equal(plain[name], fused[name]) for name in plain)
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=1e-9, atol=1e-12)
