"""The specification of a hybrid product, for each kind of student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmmamba_cli.architecture import ATTENTION, MixerConfig, mixer_spec, parameter_shapes
from mmmamba_cli.checkpoint import AnyCheckpoint, Checkpoint, InPlaceCheckpoint
from mmmamba_cli.checkpoint.in_place_checkpoint import student_layers, with_plan
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.runs import ProductModel, holistic_model
from mmmamba_cli.runs.in_place_product import in_place_model, new_tensors
from mmmamba_cli.teachers import StudentPlan


@dataclass(frozen=True)
class Hybrid:
    """A hybrid to be written; `layer_of` gives the layer of a mixer's tensor, None for others."""

    model: ProductModel
    layer_of: Callable[[str], int | None]


def mixer_names(student: AnyCheckpoint) -> tuple[str, ...]:
    """The mixer of each layer."""
    if isinstance(student, Checkpoint):
        return tuple(student.config.mixer_names)
    return _plan(student).mixers


def is_attention(mixer: str) -> bool:
    return mixer_spec(mixer).layer_type == ATTENTION


def holistic_hybrid(student: Checkpoint, mixers: Sequence[str], dtype: torch.dtype) -> Hybrid:
    """A hybrid of class `HolisticVLM` with the given mixers."""
    kinds = [mixer_spec(name).layer_type for name in mixers]
    values = {**student.config.to_dict(), "layer_types": kinds, "mixers": list(mixers)}
    config = HolisticVLMConfig.from_dict(values)
    kept = {n: s for n, s in student.shapes.items() if n.startswith("unused.")}
    shapes = {**parameter_shapes(config), **kept}
    return Hybrid(holistic_model(config, shapes, student, dtype), _holistic_layer)


def in_place_hybrid(
    student: InPlaceCheckpoint,
    mixers: Sequence[str],
    donors: Mapping[int, AnyCheckpoint],
    dtype: torch.dtype,
) -> Hybrid:
    """A hybrid that is a transformers model with the given mixers; `donors` by layer."""
    sources = [student, *(one for one in donors.values() if isinstance(one, InPlaceCheckpoint))]
    plan = StudentPlan(tuple(mixers), _options(mixers, [_plan(one) for one in sources]))
    config = with_plan(student.config, plan)
    added = new_tensors(student.config)
    stored = {name: own for name, own in student.layout.names.items() if own not in added}
    layers: dict[str, int | None] = {**student_layers(student)}
    layers |= {name: one.layer for name, one in new_tensors(config).items()}
    return Hybrid(in_place_model(config, student, dtype, stored), layers.get)


def _plan(student: InPlaceCheckpoint) -> StudentPlan:
    if student.plan is None:
        raise CheckpointError(
            f"{student.path} is a teacher, expected a student of one", "make one by `mmmamba seed`"
        )
    return student.plan


def _options(mixers: Sequence[str], plans: Sequence[StudentPlan]) -> MixerConfig:
    """The options that `mixers` read, each from the first plan that has a mixer which reads it."""
    read: dict[str, Any] = {}
    for option in _read_by(mixers):
        plan = next((one for one in plans if option in _read_by(one.mixers)), None)
        if plan is not None:
            read[option] = getattr(plan.options, option)
    return MixerConfig(**read)


def _read_by(mixers: Sequence[str]) -> set[str]:
    return {option for name in set(mixers) for option in mixer_spec(name).options}


def _holistic_layer(name: str) -> int | None:
    """The layer of a mixer parameter of a `HolisticVLM`; None for other parameters."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and parts[3] == "mixer" else None
