"""Students of any transformers model: mixers in the place of its attention, the rest unchanged.

Public functions:
    anatomy_of(config): the text decoder of a teacher, or an error that names what rules it out.
    refusal(config), bidirectional_warning(config): the same by the fields of the config alone.
    packing_problem(config): why rows of its training data hold one conversation each, if they do.
    packed_position_ids(model, inputs, seq_idx): positions of rows with several conversations.
    StudentPlan, StudentPlan.of_layers: which layers are replaced, by which mixer, its options.
    convert(model or config, plan): the student, a subclass of the teacher's class.
    student_config(config, plan): its config, with model_type `mmmamba_` and the teacher's.
    expected_tensors(config, plan): names, shapes and dtypes of its tensors, without weights;
        student_tensors(config): the same by the student's config.
    new_value(mixer, layer, name, ...): the initial value of a tensor that the teacher lacks.
    stored_layout(config, stored), model_names, unexpected_tensors: names on disk and in the model.
    student_plan(config): the plan of a loaded student; mixers_of(model): its mixers.
    CallContext: padding and packing of calls, for mixers that run outside of a student.
    register_model_type(model_type): lets the Auto classes load a student of any family.

Students load by AutoConfig, AutoModelForImageTextToText and AutoModelForCausalLM once
`mmmamba_cli.model` is imported. Importing this package imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from mmmamba_cli.lazy_imports import lazy_attributes
from mmmamba_cli.teachers.mixer_plan import MODEL_TYPE_PREFIX, PLAN_FIELD, StudentPlan
from mmmamba_cli.teachers.packed_rows import packing_problem
from mmmamba_cli.teachers.refusals import bidirectional_warning, refusal, text_config

if TYPE_CHECKING:
    from mmmamba_cli.teachers.anatomy import Anatomy, AttentionView, anatomy_of
    from mmmamba_cli.teachers.auto_class import mixers_of, student_plan
    from mmmamba_cli.teachers.call_context import CallContext
    from mmmamba_cli.teachers.config_class import register_model_type, register_students
    from mmmamba_cli.teachers.conversion import (
        ExpectedTensor,
        convert,
        expected_tensors,
        student_config,
        student_tensors,
    )
    from mmmamba_cli.teachers.mixer_in_place import MixerInPlace, new_value
    from mmmamba_cli.teachers.packed_positions import packed_position_ids
    from mmmamba_cli.teachers.stored_names import (
        StoredLayout,
        model_names,
        stored_layout,
        unexpected_tensors,
    )
else:
    __getattr__ = lazy_attributes(
        __name__,
        {
            "anatomy": ("Anatomy", "AttentionView", "anatomy_of"),
            "auto_class": ("mixers_of", "student_plan"),
            "config_class": ("register_model_type", "register_students"),
            "call_context": ("CallContext",),
            "conversion": (
                "ExpectedTensor",
                "convert",
                "expected_tensors",
                "student_config",
                "student_tensors",
            ),
            "mixer_in_place": ("MixerInPlace", "new_value"),
            "packed_positions": ("packed_position_ids",),
            "stored_names": (
                "StoredLayout",
                "model_names",
                "stored_layout",
                "unexpected_tensors",
            ),
        },
    )

__all__ = [
    "MODEL_TYPE_PREFIX",
    "PLAN_FIELD",
    "Anatomy",
    "AttentionView",
    "CallContext",
    "ExpectedTensor",
    "MixerInPlace",
    "StoredLayout",
    "StudentPlan",
    "anatomy_of",
    "bidirectional_warning",
    "convert",
    "expected_tensors",
    "mixers_of",
    "model_names",
    "new_value",
    "packed_position_ids",
    "packing_problem",
    "refusal",
    "register_model_type",
    "register_students",
    "stored_layout",
    "student_config",
    "student_plan",
    "student_tensors",
    "text_config",
    "unexpected_tensors",
]
