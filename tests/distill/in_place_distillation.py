"""Tiny teachers of transformers, their students and batches in memory, for tests of losses."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, picture, prompts, right_padded
from torch import Tensor, nn

from mmmamba_cli.data import IGNORE_INDEX, ModelBatch, StepBatches
from mmmamba_cli.distill.in_place_pair import InPlacePair
from mmmamba_cli.distill.objective import Objective, build_in_place_objective
from mmmamba_cli.distill.parallelize import ParallelPlan, parallelize
from mmmamba_cli.distill.student_layers import StudentLayers, in_place_layers
from mmmamba_cli.distill.trainable import select_trainable
from mmmamba_cli.distill.trainer import TrainingJob
from mmmamba_cli.distill.training_state import StateFolder
from mmmamba_cli.distributed import World
from mmmamba_cli.recipe import Stage
from mmmamba_cli.teachers import StudentPlan, anatomy_of, convert, mixers_of

# Parameters on which matrix orientation depends, of Mamba-2 in layers 0 and 2. Names of towers end
# alike, but their layers are those of an encoder.
MATRIX_LEARNS = tuple(
    f"*_model.layers.[02].self_attn.{name}" for name in ("[qk]_*", "dt_*", "conv1d.*", "A_log")
)


def make_stage(loss: str, learns: Any = None, **settings: Any) -> Stage:
    """A stage of a few steps in fp32."""
    default: Any = "new+qkv" if loss != "matrix-orientation" else MATRIX_LEARNS
    fields = {
        "name": "s",
        "learns": learns or default,
        "loss": loss,
        "inputs": "student" if loss == "kl" else "teacher",
        "steps": 4,
        "batch_size": 2,
        "lr": 1e-2,
        "precision": "fp32",
    }
    return Stage(**{**fields, **settings})


def make_pair(
    name: str,
    stage: Stage,
    linear: Iterable[int] = (0, 2),
    dtype: torch.dtype = torch.float64,
    teacher: Any = None,
    **plan: Any,
) -> tuple[InPlacePair, StudentLayers, tuple[str, ...]]:
    """A teacher, a student with other new parameters, where the mixers are, and all names."""
    teacher = (FAMILIES[name].model() if teacher is None else teacher).to(dtype)
    number = len(anatomy_of(teacher.config).attention)
    layout = StudentPlan.of_layers(number, linear, **plan)
    student = convert(copy.deepcopy(teacher), layout, allow_bidirectional=True)
    generator = torch.Generator().manual_seed(2)
    new: set[str] = set()
    places = {module: path for path, module in student.named_modules()}
    with torch.no_grad():
        for mixer in mixers_of(student):
            for _, part, parameter in mixer.new_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter))
                new.add(f"{places[mixer]}.{part}")
    # `convert` keeps some parameters narrower than the teacher.
    student = student.to(dtype)
    names = tuple(n for n, _ in student.named_parameters())
    anatomy = anatomy_of(teacher.config)
    layers = in_place_layers(anatomy.layers_path, anatomy.attention_name, layout, names, new)
    trainable = select_trainable(stage, layers, names)
    teacher.requires_grad_(False)
    for key, parameter in student.named_parameters():
        parameter.requires_grad_(key in trainable)
    pair = InPlacePair(teacher.eval(), student.eval(), "fp32")
    return pair.with_trainable(trainable), layers, names


def make_objective(name: str, stage: Stage, **options: Any) -> tuple[Objective, InPlacePair]:
    """The loss of a stage and its pair, see `make_pair`."""
    pair, layers, names = make_pair(name, stage, **options)
    return build_in_place_objective(stage, layers, names, pair.trainable), pair


@cache
def make_batch(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    rows: Sequence[int] = (0, 1),
    left: bool = False,
) -> ModelBatch:
    """Two rows of unequal length, each with a picture where the family takes them.

    `rows` are those to keep; without any, the batch is that of a process without rows. Padding is
    on the right, or on the left.
    """
    family = FAMILIES[name]
    if not rows:
        return ModelBatch.empty(family.tokenizer.pad_token_id)
    pictures = [picture(24 + 8 * seed, 16, seed)] if family.pictures else []
    other = [picture(16, 24, seed + 1)] if family.pictures else []
    texts = [(f"What is it? {seed}", pictures), ("Count the words of every line.", other)]
    inputs = prompts(family, [texts[row] for row in rows])
    inputs = inputs if left else right_padded(inputs)
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, :5] = IGNORE_INDEX
    return ModelBatch(inputs, labels, len(rows), int(mask.sum()), tuple(map(str, rows)))


def gradients(objective: Objective, pair: InPlacePair, batches: list[ModelBatch]) -> Any:
    """The loss of the global batch of all `batches`, and its gradient by parameter."""
    parameters = pair.trainable_parameters()
    for parameter in parameters.values():
        parameter.grad = None
    units = torch.stack([objective.count_units(pair, batch) for batch in batches]).sum(0)
    weights = objective.term_weights(units).to(pair.device)
    pair.student.train()
    loss = sum((weights * objective.loss_sums(pair, one, weights)).sum() for one in batches)
    return float(loss), gradient_of(parameters)


def gradient_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    assert found.keys() == parameters.keys()
    return found


class FamilyLoader:
    """A `StepLoader` stand-in: three batches of a family's prompts in turn.

    Of two processes each has one row; in every third step the second has none.
    """

    def __init__(self, name: str, first: int = 0, rank: int = 0, world_size: int = 1):
        self.name, self.first, self.rank, self.world_size = name, first, rank, world_size
        self.steps_per_pass = 1

    def unreadable(self) -> None:
        """None, as for a set with readable samples."""

    def steps(self, first: int, stop: int) -> Iterator[StepBatches]:
        for step in range(first, stop):
            seed = self.first + step % 3
            rows: Sequence[int] = (0, 1)
            if self.world_size > 1:
                rows = (self.rank,) if step % 3 != 1 else (0, 1)[: 2 - 2 * self.rank]
            yield StepBatches(step, (make_batch(self.name, seed, rows=rows),), (), 2)


def make_job(
    folder: Path,
    name: str,
    stage: Stage,
    world: World | None = None,
    parallel: ParallelPlan | None = None,
    **options: Any,
) -> TrainingJob:
    """A small stage on the prompts of a family, the same for the same arguments."""
    world = world or World(torch.device("cpu"))
    objective, pair = make_objective(name, stage, **options)
    parallel = parallel or ParallelPlan("replicate")
    return TrainingJob(
        stage=stage,
        pair=pair,
        objective=objective,
        gradients=parallelize(pair, objective, parallel, world),
        loader=FamilyLoader(name, 0, world.rank, world.size),
        held_out=FamilyLoader(name, 7, world.rank, world.size),
        max_bad_share=0.0,
        seed=0,
        world=world,
        states=StateFolder(folder, world),
        settings={"stage": {}, "data": {}},
    )
