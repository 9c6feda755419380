"""Teacher and student of a stage as shapes: what learns and what it takes, without a weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from mmmamba_cli.architecture import (
    StackConfig,
    is_fp32_parameter,
    mixer_spec,
    parameter_shapes,
)
from mmmamba_cli.checkpoint import Checkpoint, InPlaceCheckpoint
from mmmamba_cli.checkpoint.in_place_checkpoint import with_dtype, with_plan
from mmmamba_cli.distill.objective import Objective, build_in_place_objective, build_objective
from mmmamba_cli.distill.student_layers import StudentLayers, holistic_layers, in_place_layers
from mmmamba_cli.distill.trainable import lora_weight_names, select_trainable
from mmmamba_cli.errors import RecipeError, RunError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.recipe import Recipe, Stage
from mmmamba_cli.runs.in_place_product import new_tensors
from mmmamba_cli.teachers import StudentPlan, anatomy_of, student_tensors, text_config
from mmmamba_cli.teachers.anatomy import attention_stack

Shape = tuple[int, ...]
ATTENTION_MIXER = "attention"


@dataclass(frozen=True)
class StageShapes:
    """The parameters of both models of a stage, by their names in the model.

    Attributes:
        student: shapes of the student's parameters; a tied head is left out.
        new: names of those that the teacher lacks; it has the others.
        teacher: shapes of the teacher's parameters.
        small: names of those that stay fp32 in a narrower model.
        layers: where the student's mixers are.
        stacks: sizes of each layer.
        hidden_size, vocab_size: of the decoder and its head.
        config: of the student, of class `HolisticVLMConfig` or of transformers.
    """

    student: Mapping[str, Shape]
    new: Collection[str]
    teacher: Mapping[str, Shape]
    small: Collection[str]
    layers: StudentLayers
    stacks: tuple[StackConfig, ...]
    hidden_size: int
    vocab_size: int
    config: Any

    @property
    def has_vision(self) -> bool:
        return getattr(self.config, "vision_config", None) is not None

    def trainable(self, stage: Stage) -> tuple[list[str], list[str]]:
        """Names of trainable parameters, and of weights with an adapter; errors as in training."""
        trainable = select_trainable(stage, self.layers, self.student)
        lora = lora_weight_names(stage, trainable, self.student, self.layers.part)
        return trainable, lora

    def objective(self, stage: Stage, trainable: Sequence[str]) -> Objective:
        """The loss of a stage. Raises `RecipeError`, see `build_objective`."""
        if isinstance(self.config, HolisticVLMConfig):
            return build_objective(stage, self.config, trainable)
        return build_in_place_objective(
            stage, self.layers, self.student, trainable, has_vision=self.has_vision
        )

    def with_attention(self, layers: Collection[int]) -> StageShapes:
        """The shapes of a hybrid with the teacher's attention in `layers`."""
        mixers = [
            ATTENTION_MIXER if i in layers else name for i, name in enumerate(self.layers.mixers)
        ]
        if tuple(mixers) == self.layers.mixers:
            return self
        if isinstance(self.config, HolisticVLMConfig):
            return holistic_shapes(_with_mixers(self.config, mixers))
        plan = StudentPlan.from_json(self.config.mmmamba)
        return in_place_shapes(with_plan(self.config, replace(plan, mixers=tuple(mixers))))


def shapes_of(student: Checkpoint | InPlaceCheckpoint) -> StageShapes:
    """The shapes of a student on disk and of its teacher. Raises `RunError` for a teacher."""
    if isinstance(student, Checkpoint):
        return holistic_shapes(student.config)
    if not student.is_student:
        raise RunError(f"{student.path} is a teacher, expected a student", "see `mmmamba status`")
    return in_place_shapes(student.config)


def holistic_shapes(config: HolisticVLMConfig) -> StageShapes:
    """The shapes of a student of class `HolisticVLM` and of its teacher."""
    layers = len(config.mixer_names)
    teacher = parameter_shapes(_with_mixers(config, [ATTENTION_MIXER] * layers))
    student = parameter_shapes(config)
    return StageShapes(
        student=student,
        new=student.keys() - teacher.keys(),
        teacher=teacher,
        small={name for name in {**teacher, **student} if is_fp32_parameter(name)},
        layers=holistic_layers(config),
        stacks=tuple(config.stack_of(layer) for layer in range(layers)),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        config=config,
    )


def in_place_shapes(config: Any) -> StageShapes:
    """The shapes of a student of a transformers model, by its config, and of its teacher."""
    anatomy, text = anatomy_of(config), text_config(config)
    # In a narrower dtype, in which the tensors that stay fp32 differ from the others.
    tensors = student_tensors(with_dtype(config, torch.bfloat16))
    student = {name: one.shape for name, one in tensors.items()}
    new = new_tensors(config)
    plan = StudentPlan.from_json(config.mmmamba)
    return StageShapes(
        student=student,
        new=new.keys(),
        teacher={name: shape for name, shape in student.items() if name not in new},
        small={name for name, one in tensors.items() if one.dtype == torch.float32},
        layers=in_place_layers(
            anatomy.layers_path, anatomy.attention_name, plan, student.keys(), new
        ),
        stacks=tuple(attention_stack(view, text) for view in anatomy.attention),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        config=config,
    )


def trained_before(recipe: Recipe, stage: Stage, shapes: StageShapes) -> set[str]:
    """Parameters that earlier stages train, but for those of restored attention."""
    found: set[str] = set()
    for earlier in recipe.stages[: recipe.stages.index(stage)]:
        # Its patterns may name layers that are attention by now.
        with suppress(RecipeError):
            trainable, lora = shapes.trainable(earlier)
            found |= {*trainable, *lora}
    linear = set(shapes.layers.linear)
    layer_of = shapes.layers.mixer_part
    return {name for name in found if layer_of(name)[0] is None or layer_of(name)[0] in linear}


def _with_mixers(config: HolisticVLMConfig, mixers: Sequence[str]) -> HolisticVLMConfig:
    kinds = [mixer_spec(name).layer_type for name in mixers]
    values = {**config.to_dict(), "layer_types": kinds, "mixers": list(mixers)}
    return HolisticVLMConfig.from_dict(values)


def num_elements(shapes: Mapping[str, Shape], names: Collection[str]) -> int:
    """Number of elements of the tensors `names`."""
    return sum(prod(shapes[name]) for name in names)


def tensor_bytes(
    shapes: Mapping[str, Shape], names: Collection[str], small: Collection[str], itemsize: int
) -> int:
    """Bytes of the tensors `names` with `itemsize` bytes an element; `small` ones have four."""
    return sum(prod(shapes[n]) * (4 if n in small else itemsize) for n in names)
