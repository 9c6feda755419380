"""The code of a student of another teacher as flat files, and the names of its classes there.

A student's classes are subclasses of its family's in transformers, made when a config is read.
`remote_code` writes the modules that make them; the file `STUDENT_FILE` has those of one family
under the names that `auto_map` gives.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from mmmamba_cli import __version__
from mmmamba_cli.export.remote_code import PACKAGE, bundle_files, file_of
from mmmamba_cli.teachers import StudentPlan
from mmmamba_cli.teachers.auto_class import auto_classes, register_model
from mmmamba_cli.teachers.mixer_plan import ATTENTION_MIXER

STUDENT_FILE = "modeling_mmmamba_student"
CONFIG_MODULE, MODEL_MODULE = f"{PACKAGE}.teachers.config_class", f"{PACKAGE}.teachers.auto_class"
STUDENT_TEXT = '''# Code of mmmamba {version}, written out by `mmmamba export`.
"""{base} of transformers with mixers in the place of the attention of some text layers."""

from transformers import {base_config}

from .{package} import register_model, student_config_class

{config} = student_config_class({base_config})
{model} = register_model({config})

# transformers saves a model with the file of its module, and with what that file imports.
for one in ({config}, {model}):
    one.__module__ = __name__
{config}.register_for_auto_class()
{model}.register_for_auto_class("{auto}")
'''


def student_code(config: Any, plan: StudentPlan) -> dict[str, str]:
    """Text by file name of the code that loads a student without this package.

    `config` is the student's. Only the plan's mixers are in it.
    """
    files = _bundle(tuple(sorted({*plan.mixers, ATTENTION_MIXER})))
    config_class: Any = type(config)
    model = register_model(config_class)
    text = STUDENT_TEXT.format(
        version=__version__,
        package=file_of(MODEL_MODULE),
        base=model.__bases__[0].__name__,
        base_config=config_class.__bases__[0].__name__,
        config=config_class.__name__,
        model=model.__name__,
        auto=auto_classes(config_class)[0].__name__,
    )
    return {**files, f"{STUDENT_FILE}.py": text}


def student_auto_map(config: Any) -> dict[str, str]:
    """The section `auto_map` of a student's exported config."""
    config_class: Any = type(config)
    model = f"{STUDENT_FILE}.{register_model(config_class).__name__}"
    return {
        "AutoConfig": f"{STUDENT_FILE}.{config_class.__name__}",
        **{auto.__name__: model for auto in auto_classes(config_class)},
    }


@cache
def _bundle(mixers: tuple[str, ...]) -> dict[str, str]:
    """The files of the students' classes with these mixers; the teacher's attention is no code."""
    entries = [CONFIG_MODULE, MODEL_MODULE]
    for name in mixers:
        entries.append(f"{PACKAGE}.architecture.mixers.{name}")
        if name != ATTENTION_MIXER:
            entries.append(f"{PACKAGE}.model.mixers.{name}")
    return bundle_files(entries)
