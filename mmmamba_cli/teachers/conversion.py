"""A teacher to a student: its config, its tensors, and the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.teachers.anatomy import anatomy_of, meta_model, teacher_class
from mmmamba_cli.teachers.auto_class import (
    check_plan,
    mixers_of,
    register_model,
    student_plan,
)
from mmmamba_cli.teachers.config_class import register_config
from mmmamba_cli.teachers.mixer_plan import PLAN_FIELD, StudentPlan


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor of a student.

    `mixer` and `layer` are set for a tensor that the teacher lacks, and `part` is its name in the
    mixer; `mixer_in_place.new_value` gives its initial value.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    mixer: str | None = None
    layer: int | None = None
    part: str | None = None


def student_config(
    config: PreTrainedConfig, plan: StudentPlan, *, allow_bidirectional: bool = False
) -> PreTrainedConfig:
    """The config of a teacher's student; the teacher's is unchanged.

    Raises:
        MmmambaError: the teacher cannot be converted, the plan does not fit it, or its image tokens
            attend in both directions and `allow_bidirectional` is false.
    """
    if student_plan(config) is not None:
        raise MmmambaError(
            f"{config.model_type} is a student already", "convert its teacher with another plan"
        )
    anatomy = anatomy_of(config)
    check_plan(plan, anatomy)
    if plan.linear_layers and anatomy.warning is not None and not allow_bidirectional:
        raise MmmambaError(anatomy.warning, "allow_bidirectional=True converts it nevertheless")
    config_class = register_config(type(config))
    values = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    student: PreTrainedConfig = config_class.from_dict({**values, PLAN_FIELD: plan.to_json()})
    student.architectures = [register_model(config_class).__name__]
    _copy_attention_implementation(config, student)
    return student


def convert(
    teacher: PreTrainedModel | PreTrainedConfig,
    plan: StudentPlan,
    *,
    mimic: bool = True,
    seed: int = 0,
    allow_bidirectional: bool = False,
) -> PreTrainedModel:
    """Make a student: a subclass of the teacher's class with mixers in place of attention.

    A config gives a student with random weights. A model gives one that takes over the teacher's
    parameters without a copy, so training one changes the other; copy the teacher before
    (`copy.deepcopy`) to keep it. With `mimic` the new parameters imitate attention as closely as
    they can (mmMamba, arXiv 2502.13145, section 3.2), else they have the defaults of each mixer's
    paper.

    Raises:
        MmmambaError: see `student_config`.
    """
    is_model = isinstance(teacher, PreTrainedModel)
    config: Any = teacher.config if is_model else teacher
    own: Any = student_config(config, plan, allow_bidirectional=allow_bidirectional)
    model_class = register_model(own.__class__)
    if not is_model:
        student: Any = model_class(own)
    else:
        student = meta_model(model_class, own)
        _take_over(student, teacher)
    for mixer in mixers_of(student):
        mixer.initialize(mimic, seed)
    return student.train(teacher.training) if is_model else student.eval()


def expected_tensors(
    config: PreTrainedConfig, plan: StudentPlan, *, allow_bidirectional: bool = False
) -> dict[str, ExpectedTensor]:
    """All tensors of a student by their name in the model, without weights.

    A head that is tied to the token table is left out, as in a file. The dtype is the config's,
    fp32 if it has none, except for parameters that stay fp32. The teacher's tensors have the
    teacher's names; names on disk may differ where a family's checkpoints have older ones.

    Raises:
        MmmambaError: see `student_config`.
    """
    return student_tensors(student_config(config, plan, allow_bidirectional=allow_bidirectional))


def student_tensors(config: PreTrainedConfig) -> dict[str, ExpectedTensor]:
    """`expected_tensors` by the student's own config."""
    student: Any = meta_model(register_model(config.__class__), config)
    own = set(mixers_of(student))
    mixers = {name: module for name, module in student.named_modules() if module in own}
    dtype = config.dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    strict = student._keep_in_fp32_modules_strict
    found: dict[str, ExpectedTensor] = {}
    for name, tensor in student.state_dict().items():
        if name in student.all_tied_weights_keys:
            continue
        kind = tensor.dtype
        if tensor.is_floating_point():
            kind = torch.float32 if not strict.isdisjoint(name.split(".")) else dtype
        owner = next((path for path in mixers if name.startswith(f"{path}.")), None)
        new: dict[str, Any] = {}
        if owner is not None:
            mixer, part = mixers[owner], name.removeprefix(f"{owner}.")
            if part.split(".")[0] not in mixer.adopted:
                new = {"mixer": mixer.mixer_name, "layer": mixer.layer_idx, "part": part}
        found[name] = ExpectedTensor(tuple(tensor.shape), kind, **new)
    return found


def _take_over(student: Any, teacher: Any) -> None:
    """Give `student`, on the meta device, the parameters and buffers of `teacher`."""
    _check_class(student, teacher)
    for name, parameter in teacher.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        student.get_submodule(owner)._parameters[last] = parameter
    for name, buffer in teacher.named_buffers(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        student.get_submodule(owner)._buffers[last] = buffer
    small = student_plan(student.config)
    fp32 = frozenset() if small is None else small.fp32_parameters
    for mixer in mixers_of(student):
        weight = mixer.q_proj.weight
        for owner, name, parameter in list(mixer.new_parameters()):
            kind = weight.dtype
            if not fp32.isdisjoint(name.split(".")) and kind.itemsize < 4:
                kind = torch.float32
            fresh = torch.empty(parameter.shape, dtype=kind, device=weight.device)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(fresh))
    student.generation_config = teacher.generation_config


def _check_class(student: Any, teacher: Any) -> None:
    expected = teacher_class(type(teacher.config))
    if type(teacher) is not expected:
        raise MmmambaError(
            f"the teacher is a {type(teacher).__name__}, expected {expected.__name__}",
            "load it with AutoModelForImageTextToText, or a language model with "
            "AutoModelForCausalLM",
        )


def _copy_attention_implementation(source: Any, target: Any) -> None:
    """Copy the choice of attention, which `to_dict` leaves out, of a config and its parts."""
    target._attn_implementation_internal = source._attn_implementation_internal
    for name in source.sub_configs:
        if getattr(source, name, None) is not None:
            _copy_attention_implementation(getattr(source, name), getattr(target, name))
