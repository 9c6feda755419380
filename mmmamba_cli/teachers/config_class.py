"""Config classes of students, and their registration with transformers' Auto classes.

The model_type of a student is `mmmamba_` and its teacher's. Under the teacher's own, transformers
would load the stock class and drop the mixers' tensors with a warning. The config class of each
known family is registered when `mmmamba_cli.model` is imported; the model class follows when a
config is made, so that the import loads no modeling file.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.teachers.mixer_plan import MODEL_TYPE_PREFIX

# Families whose students are registered at import; others when a teacher or a folder names them.
FAMILIES = (
    "gemma3",
    "idefics3",
    "internvl",
    "llama",
    "llava_onevision",
    "mistral",
    "mistral3",
    "paligemma",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
)


@cache
def student_config_class(base: Any) -> Any:
    """The config class of a student: the teacher's fields, and `mmmamba` with the plan."""

    class StudentConfig(base):
        """The teacher's config with the plan of the student."""

        model_type: ClassVar[str] = MODEL_TYPE_PREFIX + base.model_type

        mmmamba: dict[str, Any] | None = None

        def __post_init__(self, **kwargs: Any) -> None:
            super().__post_init__(**kwargs)
            from mmmamba_cli.teachers.auto_class import register_model

            config_class: Any = type(self)
            register_model(config_class)

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Implement pickle, which does not find a class that is made at run time."""
            return new_student_config, (base,), self.__dict__

    StudentConfig.__name__ = StudentConfig.__qualname__ = f"Student{base.__name__}"
    return StudentConfig


def new_student_config(base: Any) -> Any:
    """A config without fields, which `pickle` sets, of the student of config class `base`.

    It is not registered: transformers copies configs, and an export's class would then be that of
    the next export too.
    """
    config_class: Any = student_config_class(base)
    return config_class.__new__(config_class)


def register_config(base: Any) -> Any:
    """Register the config class of a family's students with `AutoConfig`, and return it."""
    config_class = student_config_class(base)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    return config_class


def register_students() -> None:
    """Register the config classes of the known families."""
    for family in FAMILIES:
        register_config(CONFIG_MAPPING[family])


def register_model_type(model_type: str) -> None:
    """Register the student whose config.json has this model_type, of any family of transformers.

    Raises:
        CheckpointError: it is not a student's, or the installed transformers lacks the teacher's.
    """
    base = model_type.removeprefix(MODEL_TYPE_PREFIX)
    if base == model_type or base not in CONFIG_MAPPING:
        raise CheckpointError(
            f"model_type is {model_type}, expected {MODEL_TYPE_PREFIX} and a model_type of "
            "transformers",
            "update transformers if the family is newer than it",
        )
    register_config(CONFIG_MAPPING[base])
