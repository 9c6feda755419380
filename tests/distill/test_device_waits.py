"""The micro batches of a step are queued without a wait for the device.

Models and batches are on the meta device, which has no values: reading one raises. So does making
a tensor there from numbers, whose copy would wait for a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SIDE, prompt, small_model
from small_distillation import batch_of, make_job, packed, padded, pair_of
from torch import Tensor

from mmmamba_cli.data import IGNORE_INDEX, Batch, StepBatches
from mmmamba_cli.distill.step_values import DeviceValues
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.distill.trainer import TrainingJob, _accumulate
from mmmamba_cli.recipe import KL

PLAN = "mdwk"


@pytest.fixture(autouse=True)
def no_copies_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def guarded(make: Any) -> Any:
        def made(values: Any, **options: Any) -> Tensor:
            device = torch.device(options.get("device") or "cpu")
            assert device.type == "cpu", f"the copy of {values} to {device} waits"
            return make(values, **options)

        return made

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, guarded(getattr(torch, name)))


def meta_job(folder: Path, loss: str, shuffle: str, monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    """A job whose models are on the meta device, which autocast does not know."""
    monkeypatch.setattr(TeacherStudent, "autocast", lambda self: nullcontext())
    job = make_job(folder, loss, steps=1, plan=PLAN)
    # As in HoVLE's language stack.
    rope: Any = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    teacher, student = small_model("aaaa", shuffle, **rope), small_model(PLAN, shuffle, **rope)
    pair = pair_of(teacher.to("meta"), student.to("meta"), job.pair.trainable)
    return replace(job, pair=pair)


def texts() -> tuple[Batch, ...]:
    """Rows of one length, padded rows, and a packed row; as long as a tile's context ids."""
    rows = [torch.arange(10, 10 + length) for length in (9, 7)]
    ids, mask = padded(rows)
    return batch_of(ids[:1]), batch_of(ids, mask=mask), packed(rows)


def pictures() -> tuple[Batch, ...]:
    """Rows with as many tiles, and rows with two tiles and one, of which a part is answered."""
    rows = [prompt(tiles, 8, seed) for seed, tiles in enumerate((1, 1, 2))]
    micros = []
    for chosen in (rows[:2], rows[1:]):
        ids, mask = padded([ids[0] for ids, _ in chosen])
        labels = ids.masked_fill(~mask, IGNORE_INDEX)
        labels[:, :-3] = IGNORE_INDEX
        tiles = sum(len(pixels) for _, pixels in chosen if pixels is not None)
        # As from the loader, to be normalised on the device.
        pixels = torch.randint(256, (tiles, 3, SIDE, SIDE), dtype=torch.uint8)
        micros.append(batch_of(ids, pixels, labels, mask))
    return tuple(micros)


def queue(job: TrainingJob, micros: tuple[Batch, ...]) -> None:
    """Queue a step up to its optimiser."""
    sums, units, _ = _accumulate(job, StepBatches(0, micros, (), len(micros)))
    assert sums.device.type == "meta" and bool((units > 0).any())
    parameters = job.pair.trainable_parameters()
    assert all(parameter.grad is not None for parameter in parameters.values())
    DeviceValues(sums, job.objective.term_weights(units), parameters, job.stage.optimiser.clip)


@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
def test_texts_are_queued_without_a_wait(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(meta_job(tmp_path, loss, "pre", monkeypatch), texts())


@pytest.mark.parametrize("shuffle", ["pre", "post"])
@pytest.mark.parametrize("loss", ["mixer-mse", "kl"])
def test_pictures_are_queued_without_a_wait(
    loss: str, shuffle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = meta_job(tmp_path, loss, shuffle, monkeypatch)
    if loss == "mixer-mse":
        job = replace(job, objective=replace(job.objective, weights_pictures=True))
    else:
        settings = KL(mask="answer", reduction="token", ce_weight=0.5)
        job = replace(job, objective=replace(job.objective, settings=settings))
    queue(job, pictures())


def test_a_batch_that_was_made_on_the_device_is_read_there(tmp_path: Path) -> None:
    """As from other loaders than this package's; the results are the same."""
    job = make_job(tmp_path, "kl", steps=1, plan=PLAN)
    for micro in (one.to("cpu") for one in (*texts(), *pictures())):
        weights = job.objective.term_weights(job.objective.count_units(job.pair, micro))
        found = job.objective.loss_sums(job.pair, micro, weights)
        moved = replace(micro, on_host=micro)
        assert torch.equal(found, job.objective.loss_sums(job.pair, moved, weights))
