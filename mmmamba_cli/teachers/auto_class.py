"""Model classes of students: subclasses of the teacher's, made once for each family.

The config classes are in `config_class`, which does not import the mixers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mmmamba_cli.architecture import MixerConfig, TextStack, mixer_spec, mixer_specs
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.teachers.anatomy import (
    ATTENTION_NAME,
    Anatomy,
    anatomy_of,
    attention_stack,
    teacher_class,
    text_decoder,
)
from mmmamba_cli.teachers.call_context import CallContext
from mmmamba_cli.teachers.config_class import student_config_class
from mmmamba_cli.teachers.mixer_in_place import MixerInPlace, in_place_class
from mmmamba_cli.teachers.mixer_plan import ATTENTION_MIXER, PLAN_FIELD, StudentPlan
from mmmamba_cli.teachers.refusals import text_config


@cache
def student_model_class(config_class: Any) -> Any:
    """The model class of a student, a subclass of the teacher's with a language model head."""
    teacher_config = teacher_config_class(config_class)
    base: Any = teacher_class(teacher_config)
    # A class body cannot read a variable of the name that it assigns.
    student_config = config_class

    class Student(base):
        """The teacher's model with mixers in some of its text layers."""

        config_class = student_config

        def post_init(self) -> None:
            """Extend transformers' method, which runs once all modules of the teacher exist."""
            install_mixers(self)
            super().post_init()

        def initialize_weights(self) -> None:
            """Extend transformers' method, which knows the teacher's modules only."""
            super().initialize_weights()
            for mixer in mixers_of(self):
                if not mixer.is_initialized:
                    mixer.initialize()

        @staticmethod
        def create_masks_for_generate(attention_mask: Any = None, **unused: Any) -> Any:
            """Keep masks two-dimensional, which the mixers read; forward makes attention's.

            `generate` calls it with static caches.
            """
            return attention_mask

        def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
            """Whether `generate` compiles decoding: not with mixers, which count columns."""
            if any(True for _ in mixers_of(self)):
                return False
            return bool(super()._valid_auto_compile_criteria(*args, **kwargs))

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
            """Implement `to`, `half` and `bfloat16`, keeping the mixers' small parameters in fp32.

            transformers applies `_keep_in_fp32_modules_strict` in `from_pretrained` only.
            """
            return super()._apply(keep_fp32(self, fn), recurse)

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Implement pickle, which does not find a class that is made at run time."""
            return new_student, (teacher_config,), self.__dict__

    Student.__name__ = Student.__qualname__ = student_class_name(base)
    return Student


def new_student(teacher_config: Any) -> Any:
    """A student without modules, which `pickle` sets, by the config class of its teacher."""
    model_class = register_model(student_config_class(teacher_config))
    return model_class.__new__(model_class)


def student_class_name(base: type) -> str:
    """Name of a student's class, as `architectures` in its config.json has it.

    `generate` gives its cache to classes with "mamba" in their names as `cache_params`, which the
    teacher's forward does not read: up to transformers 5.23 a static cache would be ignored.
    """
    return f"Student{base.__name__}"


@cache
def register_model(config_class: Any) -> Any:
    """Register the model class of a student's config with the Auto classes, and return it.

    The processor is the teacher's, also for a folder that does not name its class. Names of tensors
    on disk are those of the teacher's family, by the conversions of its model_type.
    """
    model_class = student_model_class(config_class)
    teacher_config = teacher_config_class(config_class)
    base = teacher_class(teacher_config)
    for auto in auto_classes(config_class):
        auto.register(config_class, model_class, exist_ok=True)
    if teacher_config in PROCESSOR_MAPPING:
        AutoProcessor.register(config_class, PROCESSOR_MAPPING[teacher_config], exist_ok=True)
    own_type = config_class.model_type
    names = {base.__name__: model_class.__name__, teacher_config.model_type: own_type}
    for teacher_name, own_name in names.items():
        mapping = get_checkpoint_conversion_mapping(teacher_name)
        if mapping is not None:
            register_checkpoint_conversion_mapping(own_name, mapping, overwrite=True)
    return model_class


def auto_classes(config_class: Any) -> list[Any]:
    """The Auto classes of transformers that load a student: those that load its teacher."""
    teacher_config = teacher_config_class(config_class)
    base = teacher_class(teacher_config)
    return [
        auto
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM)
        if teacher_config in auto._model_mapping and auto._model_mapping[teacher_config] is base
    ]


def student_plan(config: Any) -> StudentPlan | None:
    """The plan of a student's config; None for any other config.

    Raises:
        MmmambaError: the plan is invalid.
    """
    section = getattr(config, PLAN_FIELD, None)
    return None if not isinstance(section, dict) else StudentPlan.from_json(section)


def install_mixers(model: Any) -> None:
    """Replace the attention of the layers that the config's plan names; do nothing twice.

    Raises:
        MmmambaError: the plan does not fit the model, or a mixer does not fit its attention.
    """
    plan = student_plan(model.config)
    if plan is None or not plan.linear_layers or any(True for _ in mixers_of(model)):
        return
    anatomy = anatomy_of(model.config, model)
    check_plan(plan, anatomy)
    decoder, text, context = text_decoder(model), text_config(model.config), CallContext()
    for index in plan.linear_layers:
        layer = decoder.layers[index]
        stack = attention_stack(anatomy.attention[index], text)
        shape = TextStack(anatomy.hidden_size, stack, plan.options)
        mixer = in_place_class(plan.mixers[index])(
            getattr(layer, ATTENTION_NAME), shape, index, context
        )
        setattr(layer, ATTENTION_NAME, mixer)
    inner = [model.base_model, decoder]
    context.attach(*{id(module): module for module in (model, *inner)}.values())
    model._keep_in_fp32_modules_strict = {
        *(model._keep_in_fp32_modules_strict or ()),
        *plan.fp32_parameters,
    }


def check_plan(plan: StudentPlan, anatomy: Anatomy) -> None:
    """Raise `MmmambaError` unless the plan fits the teacher."""
    if len(plan.mixers) != anatomy.num_layers:
        raise MmmambaError(
            f"the plan names the mixers of {len(plan.mixers)} layers, but the text decoder of "
            f"{anatomy.model_type} has {anatomy.num_layers}"
        )
    turning = next((name for name in plan.mixers if turns_heads(name, plan.options)), None)
    if turning is not None and anatomy.rope_problem is not None:
        others = [
            name
            for name in mixer_specs()
            if "rope" in mixer_spec(name).options and name != ATTENTION_MIXER
        ]
        raise MmmambaError(
            f"{mixer_spec(turning).title} with RoPE cannot replace the attention of "
            f"{anatomy.model_type}: {anatomy.rope_problem}",
            f"take a mixer without RoPE: {', '.join(others)}, with mixer.rope false",
        )


def turns_heads(mixer: str, options: MixerConfig) -> bool:
    """Whether a mixer in the place of attention turns q and k by RoPE."""
    # Mixers without the option are kinds of attention.
    return mixer != ATTENTION_MIXER and (options.rope or "rope" not in mixer_spec(mixer).options)


def mixers_of(model: Any) -> Iterator[Any]:
    """The mixers of a student, `MixerInPlace` modules, in the order of its layers."""
    return (module for module in model.modules() if isinstance(module, MixerInPlace))


def keep_fp32(model: Any, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, except that the small parameters of mixers get no dtype narrower than fp32."""
    plan = student_plan(model.config)
    names = frozenset() if plan is None else plan.fp32_parameters
    kept: dict[int, Tensor] = {}
    for mixer in mixers_of(model):
        for _, name, parameter in mixer.new_parameters():
            if not names.isdisjoint(name.split(".")):
                # The values keep the tensors alive, so that no id is reused.
                kept |= {id(one): one for one in (parameter, parameter.grad) if one is not None}

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if id(tensor) in kept and result.is_floating_point() and result.dtype.itemsize < 4:
            return tensor.to(result.device, torch.float32)
        return result

    return apply


def teacher_config_class(config_class: Any) -> Any:
    """The config class of the teacher, the base of a student's."""
    return config_class.__bases__[0]
