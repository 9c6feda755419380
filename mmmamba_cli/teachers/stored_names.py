"""Names of a student's or a teacher's tensors on disk, and in the model.

Checkpoints of some families have older names than the model; transformers renames when it loads,
and back when it saves. A student's file may hold the teacher's tensors under the teacher's stored
names, and new tensors under their names in the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mmmamba_cli.teachers.anatomy import meta_model, teacher_class
from mmmamba_cli.teachers.auto_class import register_model, student_plan


def model_names(config: Any, stored: Iterable[str]) -> dict[str, str]:
    """The name in the model of each name on disk, of the model of a student's or teacher's config.

    Several names have the same one where transformers joins tensors (experts of a mixture). A name
    that the model lacks stays as the renaming leaves it.
    """
    return _names(_model(config), stored)


def unexpected_tensors(config: Any, stored: Iterable[str]) -> list[str]:
    """Names on disk that the model does not have, which `from_pretrained` drops with a warning.

    For a student's file under its teacher's model_type these are the mixers' new tensors.
    """
    model = _model(config)
    known, ignored = model.state_dict().keys(), model._keys_to_ignore_on_load_unexpected or ()
    return [
        name
        for name, own in _names(model, stored).items()
        if own not in known and not any(re.search(pattern, own) for pattern in ignored)
    ]


def _model(config: Any) -> Any:
    if student_plan(config) is not None:
        return meta_model(register_model(config.__class__), config)
    return meta_model(teacher_class(type(config)), config)


def _names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    prefix, known = model.base_model_prefix, model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, prefix, known)[0] for name in stored
    }
