"""Memory of distillation: shared tensors, one layer at a time, out-of-memory messages."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from small import IMAGE_ID
from small_distillation import batch_of, make_job
from torch import Tensor

from mmmamba_cli.architecture import is_fp32_parameter
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.distill.model_pair import PairPlacement
from mmmamba_cli.distill.out_of_memory import out_of_memory_error
from mmmamba_cli.distill.teacher_student import load_teacher_student
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.runs import Run
from mmmamba_cli.seed import seed_student


@pytest.fixture
def run(hovle_folder: Path) -> Run:
    run = Run(hovle_folder.parent / "run")
    seed_student(run, open_checkpoint(hovle_folder), load_recipe("smoke"), dtype=torch.bfloat16)
    return run


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_frozen_tensors_share_the_teachers_memory(run: Run, precision: str) -> None:
    student = run.open_product("seed")
    stage = load_recipe("smoke").stages[1]
    names = trainable_names(stage, student.config, list(student.shapes))
    pair = load_teacher_student(
        run.open_teacher(),
        student,
        names,
        PairPlacement(torch.bfloat16, precision, torch.device("cpu")),
    )
    theirs = dict(pair.teacher.named_parameters())
    for name, parameter in pair.student.named_parameters():
        if name in names:
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32
            assert parameter is not theirs.get(name)
        else:
            assert parameter is theirs[name], name
            assert not parameter.requires_grad
            small = is_fp32_parameter(name)
            wide = small or precision == "fp32"
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16)
    # The teacher gets the same cast as the student got at seeding.
    name = "model.layers.0.mixer.q_proj.weight"
    assert torch.equal(theirs[name], pair.student.get_parameter(name).to(theirs[name].dtype))


def saved_bytes(plan: str, loss: str, folder: Path) -> int:
    """Peak bytes of tensors that autograd saves during the loss of a student with that `plan`."""
    job = make_job(folder, loss, steps=1, plan=plan)
    live: weakref.WeakSet[Holder] = weakref.WeakSet()
    peak = 0

    def pack(tensor: Tensor) -> Holder:
        nonlocal peak
        holder = Holder(tensor)
        live.add(holder)
        peak = max(peak, sum(held.tensor.nbytes for held in live))
        return holder

    ids = torch.randint(8, IMAGE_ID, (1, 200), generator=torch.Generator().manual_seed(0))
    batch = batch_of(ids)
    weights = job.objective.term_weights(job.objective.count_units(job.pair, batch))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        job.objective.loss_sums(job.pair, batch, weights)
    return peak


class Holder:
    """A weakly referenceable holder of a saved tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


@pytest.mark.parametrize("loss", ["mixer-mse", "hidden-alignment", "matrix-orientation"])
def test_layer_losses_hold_one_layer_at_a_time(loss: str, tmp_path: Path) -> None:
    shallow = saved_bytes("mm", loss, tmp_path / "a")
    deep = saved_bytes("mmmmmmmm", loss, tmp_path / "b")
    assert deep == shallow > 0


def test_out_of_memory_suggests_settings() -> None:
    recipe = load_recipe("mmmamba-linear")
    auto = recipe.stages[2]
    assert (auto.accumulation, auto.checkpointing) == ("auto", "auto")
    stage = auto.model_copy(update={"checkpointing": True})
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")
    text = str(out_of_memory_error(stage, recipe, Progress(step=7), error, 3))
    assert "stage3 ran out of device memory after step 7: CUDA out of memory" in text
    # At least twice as many as there were, and a divisor of the batch size, 64.
    assert "--set stages.stage3.accumulation=8" in text
    assert "--set stages.stage3.max_length=4096" in text
    assert "--set data.max_tiles=6" in text
    one = recipe.stages[0].model_copy(update={"batch_size": 3, "accumulation": 3})
    assert "accumulation=" not in str(out_of_memory_error(one, recipe, Progress(), error, 3))
    assert "--set stages.stage3.checkpointing=true" in str(
        out_of_memory_error(auto, recipe, Progress(), error, 1)
    )
    assert "checkpointing=" not in text
