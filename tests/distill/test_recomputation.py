"""`checkpointing: auto`: the number of layers that recompute, and the same bits for any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import in_place_distillation
import pytest
import torch
from small import IMAGE_ID
from small_distillation import ChangedLoader, RandomLoader, equal, make_job, run_job

from mmmamba_cli.data import StepBatches
from mmmamba_cli.distill import trainer
from mmmamba_cli.distill.recomputation import (
    GIB,
    CudaMemory,
    Decision,
    Recomputation,
    StepMemory,
)
from mmmamba_cli.distill.trainer import TrainingJob
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import World

MIB = 2**20
PEAK = 10 * MIB
NUM_LAYERS = 4


class MadeUpMemory:
    """Each call of `allocated` finds a MiB more: a run of a layer seems to keep that much.

    A step with every layer recomputed takes `PEAK`.
    """

    name = "made-up device"

    def __init__(self, available: float):
        self._available = round(available)
        self.calls = 0
        self.peak_resets = 0

    def available(self) -> int:
        return self._available

    def allocated(self) -> int:
        self.calls += 1
        return self.calls * MIB

    def peak(self) -> int:
        return MIB + PEAK

    def reset_peak(self) -> None:
        self.peak_resets += 1


def memory_for(layers: int) -> MadeUpMemory:
    """Memory in which `layers` layers have to recompute."""
    return MadeUpMemory((PEAK + (NUM_LAYERS - layers + 0.5) * MIB) / 0.9)


def recomputing(job: Any) -> list[bool]:
    return [bool(layer.gradient_checkpointing) for layer in job.pair.checkpointable_layers]


def auto_job(folder: Path, memory: MadeUpMemory | None, log: list[str], **settings: Any) -> Any:
    job = make_job(folder, "kl", plan="gdam", checkpointing="auto", **{"steps": 4, **settings})
    return replace(job, memory=memory, log=log.append)


@pytest.mark.parametrize("layers", [0, 1, 3, 4])
def test_any_number_of_layers_has_the_same_bits(layers: int, tmp_path: Path) -> None:
    kept, learned = run_job(make_job(tmp_path / "a", "kl", steps=4, plan="gdam"))
    memory, log, progress = memory_for(layers), [], Progress()
    job = auto_job(tmp_path / "b", memory, log)
    results, again = run_job(job, progress)
    assert [r.loss for r in results] == [r.loss for r in kept]
    assert [r.gradient_norm for r in results] == [r.gradient_norm for r in kept]
    assert equal(learned, again)
    assert recomputing(job) == [index < layers for index in range(4)]
    # Both runs of each layer are measured whole, in one step.
    assert memory.calls == 1 + 2 * 2 * NUM_LAYERS
    # At the start, and around the measured step.
    assert memory.peak_resets == 3
    assert len(log) == 1
    assert f"{layers} of 4 layers recompute their activations" in log[0]
    saved = job.states.read_record("step-00000004").progress
    assert saved.recomputation == progress.recomputation
    assert saved.recomputation["layers"] == layers


def test_without_recomputation_the_bits_are_the_same(tmp_path: Path) -> None:
    runs = [
        run_job(make_job(tmp_path / str(choice), "kl", steps=3, checkpointing=choice))
        for choice in (True, False)
    ]
    (kept, learned), (recomputed, again) = runs
    assert [r.loss for r in kept] == [r.loss for r in recomputed]
    assert equal(learned, again)


def test_a_cpu_keeps_all_activations(tmp_path: Path) -> None:
    log: list[str] = []
    progress = Progress()
    job = auto_job(tmp_path, None, log, steps=2)
    run_job(job, progress)
    assert recomputing(job) == [False] * 4
    assert log == ["checkpointing auto: 0 of 4 layers recompute their activations, on a CPU"]
    assert progress.recomputation == {"layers": 0, "of": 4, "load": 0, "place": "cpu x 1"}


def test_a_layer_loss_recomputes_nothing(tmp_path: Path) -> None:
    log: list[str] = []
    job = make_job(tmp_path, "mixer-mse", steps=1, checkpointing="auto")
    progress = Progress()
    run_job(replace(job, memory=memory_for(3), log=log.append), progress)
    assert (log, progress.recomputation) == ([], None)
    assert "recomputation" not in progress.as_dict()


def test_a_resumed_training_keeps_the_decision(tmp_path: Path) -> None:
    log: list[str] = []
    begun, _ = run_job(auto_job(tmp_path / "a", memory_for(3), log, steps=6), stop_at=3)
    other = memory_for(1)
    job = auto_job(tmp_path / "a", other, log, steps=6)
    # Batches that are not larger than those before.
    progress = job.states.read_record("step-00000003").progress
    progress.recomputation["load"] = 10**6
    ended, learned = run_job(job, progress)
    assert other.calls == 0
    assert recomputing(job) == [True, True, True, False]
    whole, expected = run_job(auto_job(tmp_path / "b", memory_for(3), [], steps=6))
    assert [r.loss for r in begun + ended] == [r.loss for r in whole]
    assert equal(learned, expected)
    # Elsewhere there may be more or less memory.
    progress = job.states.read_record("step-00000006").progress
    progress.recomputation["place"] = "another device x 1"
    moved = Recomputation(
        job.pair, job.world, other, log.append, Decision(**progress.recomputation)
    )
    assert moved.decision is None


def test_a_larger_batch_needs_more_recomputation(tmp_path: Path) -> None:
    """Measured once: the second decision is computed from the load."""

    def widened(batches: StepBatches) -> StepBatches:
        if batches.step < 2:
            return batches
        loader = RandomLoader(IMAGE_ID, 12, seed=3)
        return replace(next(iter(loader.steps(0, 1))), step=batches.step)

    memory, log, progress = memory_for(1), [], Progress()
    job: TrainingJob = auto_job(tmp_path, memory, log)
    run_job(replace(job, loader=ChangedLoader(job.loader, widened)), progress)
    assert memory.calls == 1 + 2 * 2 * NUM_LAYERS
    assert [line.split()[2] for line in log] == ["1", "4"]
    assert progress.recomputation["layers"] == 4


def test_processes_decide_alike(tmp_path: Path) -> None:
    """Another process, which needs three layers, is asked by `all_gather`."""

    @dataclass(frozen=True)
    class TwoProcesses(World):
        def all_gather(self, values: Any) -> Any:
            return [*values, (3, 1000)]

    job = auto_job(tmp_path, None, [])
    world = TwoProcesses(torch.device("cpu"))
    found = Recomputation(job.pair, world, memory_for(1), lambda text: None)
    batches = next(iter(job.loader.steps(0, 1)))
    assert found.prepare_step(batches, ran(job))
    assert not found.prepare_step(batches, ran(job))
    assert asdict(found.decision)["layers"] == 3
    assert found.decision.load == 1000


def ran(job: TrainingJob) -> Callable[[StepBatches], bool]:
    """Forward and backward pass of micro batches, as the trainer runs them."""

    def run(batches: StepBatches) -> bool:
        job.pair.student.train()
        for micro in batches.micro_batches:
            units = job.objective.count_units(job.pair, micro)
            job.objective.loss_sums(job.pair, micro, job.objective.term_weights(units))
        return True

    return run


def test_the_measured_step_draws_no_random_number(tmp_path: Path) -> None:
    job = auto_job(tmp_path, None, [])
    batches = next(iter(job.loader.steps(0, 1)))

    def run(part: StepBatches) -> bool:
        torch.rand(3)
        return ran(job)(part)

    before = torch.get_rng_state()
    Recomputation(job.pair, job.world, memory_for(2), lambda text: None).prepare_step(batches, run)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("micro_batches", "measured"), [(1, 1), (3, 2)])
def test_gradients_of_the_micro_batch_before_are_measured(
    micro_batches: int, measured: int, tmp_path: Path
) -> None:
    job = auto_job(tmp_path, None, [])
    batches = next(iter(job.loader.steps(0, 1)))
    (micro, *_) = batches.micro_batches
    found: list[int] = []

    def run(part: StepBatches) -> bool:
        found.append(len(part.micro_batches))
        return ran(job)(part)

    several = replace(batches, micro_batches=(micro,) * micro_batches)
    Recomputation(job.pair, job.world, memory_for(2), lambda text: None).prepare_step(several, run)
    assert found == [measured]


class EarlierTraining(MadeUpMemory):
    """The peak is that of an earlier training until it is reset."""

    def peak(self) -> int:
        return MIB if self.peak_resets else 9 * MIB


def test_peak_memory_is_that_of_this_training(tmp_path: Path) -> None:
    job = make_job(tmp_path, "kl", steps=2, plan="gdam")
    results, _ = run_job(replace(job, memory=EarlierTraining(0)))
    assert [result.memory_gib for result in results] == [MIB / GIB] * 2


def test_a_later_step_of_accumulation_auto_may_have_several_micro_batches(tmp_path: Path) -> None:
    found: list[int] = []
    accumulate = trainer._accumulate

    def counted(job: TrainingJob, batches: StepBatches) -> Any:
        found.append(len(batches.micro_batches))
        return accumulate(job, batches)

    for accumulation in (1, "auto"):
        log: list[str] = []
        job = auto_job(tmp_path / str(accumulation), memory_for(2), log, steps=1)
        stage = job.stage.model_copy(update={"accumulation": accumulation})
        with mock.patch.object(trainer, "_accumulate", counted):
            run_job(replace(job, stage=stage))
    # Each measured, then trained.
    assert found == [1, 1, 2, 1]


def test_what_does_not_fit_recomputes_everything() -> None:
    memory = StepMemory(load=100, recomputed=10, kept=(5, 1, 1), limit=12)
    assert [memory.count_for(load) for load in (50, 100, 120, 500)] == [1, 1, 3, 3]
    assert replace(memory, kept=(0, 0, 0)).count_for(1) == 3
    assert replace(memory, limit=17).count_for(100) == 0


def test_layers_of_a_transformers_model(tmp_path: Path) -> None:
    stage = in_place_distillation.make_stage("kl", steps=2)
    found = []
    for name, count in (("all", 4), ("some", 2), ("none", 0)):
        job = in_place_distillation.make_job(tmp_path / name, "qwen2_5_vl", stage)
        memory = memory_for(count)
        auto = stage.model_copy(update={"checkpointing": "auto"})
        job = replace(job, stage=auto, memory=memory, held_out=None)
        results, learned = run_job(job)
        assert recomputing(job) == [index < count for index in range(4)]
        found.append(([result.loss for result in results], learned))
    for losses, learned in found[1:]:
        assert losses == found[0][0]
        assert equal(learned, found[0][1])


def test_processes_of_one_gpu_plan_with_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others do not hold yet is free now, and not later."""
    for name, value in (("mem_get_info", (70, 100)), ("memory_reserved", 12)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    device = torch.device("cuda")
    assert CudaMemory(device).available() == 72
    assert CudaMemory(device, share=0.5).available() == 40
    # Less than the share is free.
    assert CudaMemory(device, share=0.9).available() == 72


def test_a_decision_does_not_hold_for_another_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    job = auto_job(tmp_path, None, [])
    names = [CudaMemory(torch.device("cuda"), share).name for share in (1.0, 0.25)]
    assert names == ["NVIDIA H200", "25% of NVIDIA H200"]
    memory = memory_for(0)
    decided = []
    for name in names:
        memory.name = name
        earlier = Decision(2, NUM_LAYERS, 10**9, f"{names[0]} x 1")
        found = Recomputation(job.pair, job.world, memory, lambda text: None, earlier)
        decided.append(found.decision is not None)
    assert decided == [True, False]
