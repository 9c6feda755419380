"""Teacher and student of a stage on disk, for all kinds of models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmmamba_cli.architecture import MixerConfig, parameter_shapes
from mmmamba_cli.checkpoint import AnyCheckpoint, Checkpoint, InPlaceCheckpoint
from mmmamba_cli.distill.in_place_pair import load_in_place_pair
from mmmamba_cli.distill.model_pair import ModelPair, PairPlacement
from mmmamba_cli.distill.objective import Objective, build_in_place_objective, build_objective
from mmmamba_cli.distill.student_layers import StudentLayers, holistic_layers, in_place_layers
from mmmamba_cli.distill.teacher_student import load_teacher_student
from mmmamba_cli.distill.trainable import lora_weight_names, select_trainable
from mmmamba_cli.errors import RecipeError, RunError
from mmmamba_cli.recipe import Stage
from mmmamba_cli.runs import ProductModel, Run, holistic_model
from mmmamba_cli.runs.in_place_product import in_place_model, new_tensors
from mmmamba_cli.teachers import StudentPlan, anatomy_of
from mmmamba_cli.teachers.anatomy import meta_model
from mmmamba_cli.teachers.auto_class import register_model


class StageModels(Protocol):
    """The checkpoints of a stage: what training and its product need of them."""

    @property
    def teacher(self) -> AnyCheckpoint: ...

    @property
    def student(self) -> AnyCheckpoint: ...

    @property
    def layers(self) -> StudentLayers: ...

    @property
    def names(self) -> Collection[str]:
        """Names of the student's parameters in its model."""
        ...

    def objective(self, stage: Stage, trainable: Sequence[str]) -> Objective:
        """The loss of a stage. Raises `RecipeError`, see `build_objective`."""
        ...

    def load(self, trainable: Collection[str], placement: PairPlacement) -> ModelPair:
        """Load both models; `trainable` parameters become fp32 master weights."""
        ...

    def product_model(self, dtype: torch.dtype) -> ProductModel:
        """The model of a product with the student's tensors."""
        ...

    def read(self, name: str) -> Tensor:
        """The parent's value of a parameter, by its name in the model, as it is stored."""
        ...

    def model_name(self, stored: str) -> str:
        """The name in the model of a tensor, by its name in the product's file."""
        ...


def trainable_of(models: StageModels, stage: Stage) -> tuple[list[str], list[str]]:
    """Names of the trainable parameters, and of the weights that get an adapter.

    Raises:
        RecipeError: see `select_trainable` and `lora_weight_names`.
    """
    trainable = select_trainable(stage, models.layers, models.names)
    return trainable, lora_weight_names(stage, trainable, models.names, models.layers.part)


def open_stage_models(run: Run, parent: str, teacher_path: Path | None) -> StageModels:
    """Open the teacher of a run and its product `parent`. Raises `RunError`."""
    teacher, student = run.open_any_teacher(teacher_path), run.open_any_product(parent)
    if isinstance(teacher, Checkpoint) and isinstance(student, Checkpoint):
        return HolisticModels(teacher, student)
    if isinstance(teacher, InPlaceCheckpoint) and isinstance(student, InPlaceCheckpoint):
        return InPlaceModels(teacher, student)
    raise RunError(
        f"product {parent!r} of {run.folder} and its teacher are models of different kinds",
        "seed another --run from this teacher",
    )


@dataclass(frozen=True)
class HolisticModels:
    """`StageModels` of class `HolisticVLM`."""

    teacher: Checkpoint
    student: Checkpoint

    @cached_property
    def layers(self) -> StudentLayers:
        return holistic_layers(self.student.config)

    @cached_property
    def names(self) -> Collection[str]:
        return parameter_shapes(self.student.config)

    def objective(self, stage: Stage, trainable: Sequence[str]) -> Objective:
        return build_objective(stage, self.student.config, trainable)

    def load(self, trainable: Collection[str], placement: PairPlacement) -> ModelPair:
        return load_teacher_student(self.teacher, self.student, trainable, placement)

    def product_model(self, dtype: torch.dtype) -> ProductModel:
        student = self.student
        unused = {n: s for n, s in student.shapes.items() if n.startswith("unused.")}
        shapes = {**parameter_shapes(student.config), **unused}
        return holistic_model(student.config, shapes, student, dtype)

    def read(self, name: str) -> Tensor:
        return self.student.read(name)

    def model_name(self, stored: str) -> str:
        return stored


@dataclass(frozen=True)
class InPlaceModels:
    """`StageModels` of a transformers class."""

    teacher: InPlaceCheckpoint
    student: InPlaceCheckpoint

    @cached_property
    def layers(self) -> StudentLayers:
        config = self.student.config
        anatomy = anatomy_of(config)
        plan = StudentPlan.from_json(config.mmmamba)
        path, part = anatomy.layers_path, anatomy.attention_name
        return in_place_layers(path, part, plan, self.names, new_tensors(config))

    @cached_property
    def names(self) -> Collection[str]:
        config: Any = self.student.config
        model = meta_model(register_model(config.__class__), config)
        tied = model.all_tied_weights_keys
        return tuple(name for name, _ in model.named_parameters() if name not in tied)

    def objective(self, stage: Stage, trainable: Sequence[str]) -> Objective:
        layout = self.student.layout
        converted = {layout.names[name] for name in layout.converted}
        joined = next((name for name in trainable if name in converted), None)
        if joined is not None:
            raise RecipeError(
                f"stages.{stage.name}.learns: {joined} cannot learn: transformers joins it from "
                "several tensors of the file, and a product could not be written",
                "name parameters of the mixers, for example --set "
                f"stages.{stage.name}.learns=new+qkv",
            )
        return build_in_place_objective(
            stage, self.layers, self.names, trainable, has_vision=self.student.has_vision
        )

    def load(self, trainable: Collection[str], placement: PairPlacement) -> ModelPair:
        return load_in_place_pair(self.teacher, self.student, trainable, placement)

    def product_model(self, dtype: torch.dtype) -> ProductModel:
        config = self.student.config
        new = new_tensors(config)
        stored = {n: own for n, own in self.student.layout.names.items() if own not in new}
        return in_place_model(config, self.student, dtype, stored)

    @cached_property
    def _stored_names(self) -> Mapping[str, str]:
        return {own: name for name, own in self.student.layout.names.items()}

    def read(self, name: str) -> Tensor:
        return self.student.read(self._stored_names[name])

    def model_name(self, stored: str) -> str:
        return self.student.layout.names.get(stored, stored)


def seeded_mixers(student: AnyCheckpoint) -> tuple[Sequence[str], MixerConfig]:
    """The mixer of each layer of a student, and their options. Raises `RunError` for a teacher."""
    if isinstance(student, Checkpoint):
        return student.architecture.mixer_names, student.architecture.mixer_config
    if student.plan is None:
        raise RunError(f"{student.path} is a teacher, expected a student", "see `mmmamba status`")
    return student.plan.mixers, student.plan.options
