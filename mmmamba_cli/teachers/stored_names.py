"""Names of a student's or a teacher's tensors on disk, and in the model.

Checkpoints of some families have older names than the model; transformers renames when it loads,
and back when it saves. A student's file may hold the teacher's tensors under the teacher's stored
names, and new tensors under their names in the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mmmamba_cli.teachers.anatomy import meta_model, teacher_class
from mmmamba_cli.teachers.auto_class import register_model, student_plan


@dataclass(frozen=True)
class StoredLayout:
    """The tensors of a file against those of its model.

    Attributes:
        names: the name in the model of each name on disk.
        shapes: the shape of each tensor of the model, tied ones once.
        converted: names on disk whose tensors transformers joins or transposes as it loads them.
        tied: names on disk of tensors that the model does not have apart: the name in the model of
            the tensor that they must equal.
        ignored: names on disk that the model never reads.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    converted: frozenset[str]
    tied: Mapping[str, str]
    ignored: frozenset[str]

    def expected_shapes(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The names and shapes that the file should have, where its tensors are `stored`.

        Missing tensors have their names in the model.
        """
        wanted = {
            name: stored[name] if name in self.converted else self.shapes[own]
            for name, own in self.names.items()
            if own in self.shapes
        }
        known = set(self.names.values())
        # A file may hold the other one of two tied tensors.
        known |= set(self.tied.values())
        missing = {own: shape for own, shape in self.shapes.items() if own not in known}
        accepted = {name: stored[name] for name in self.ignored}
        accepted |= {name: self.shapes[own] for name, own in self.tied.items()}
        return {**wanted, **accepted, **missing}


def stored_layout(config: Any, stored: Iterable[str]) -> StoredLayout:
    """Compare the names of a file with the model of a student's or teacher's config."""
    model = _model(config)
    names = _names(model, stored)
    tied_keys = model.all_tied_weights_keys
    state = model.state_dict()
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    return StoredLayout(
        names={name: own for name, (own, _) in names.items()},
        shapes={
            name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied_keys
        },
        converted=frozenset(name for name, (_, converter) in names.items() if converter),
        tied={name: tied_keys[own] for name, (own, _) in names.items() if own in tied_keys},
        ignored=frozenset(
            name
            for name, (own, _) in names.items()
            if own not in state and any(re.search(pattern, own) for pattern in ignored)
        ),
    )


def model_names(config: Any, stored: Iterable[str]) -> dict[str, str]:
    """The name in the model of each name on disk, of the model of a student's or teacher's config.

    Several names have the same one where transformers joins tensors (experts of a mixture). A name
    that the model lacks stays as the renaming leaves it.
    """
    return dict(stored_layout(config, stored).names)


def unexpected_tensors(config: Any, stored: Iterable[str]) -> list[str]:
    """Names on disk that the model does not have, which `from_pretrained` drops with a warning.

    For a student's file under its teacher's model_type these are the mixers' new tensors.
    """
    layout = stored_layout(config, stored)
    return [
        name
        for name, own in layout.names.items()
        if own not in layout.shapes and name not in layout.tied and name not in layout.ignored
    ]


def _model(config: Any) -> Any:
    if student_plan(config) is not None:
        return meta_model(register_model(config.__class__), config)
    return meta_model(teacher_class(type(config)), config)


def _names(model: Any, stored: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """The name in the model, and the pattern of the converter that matches, if any."""
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    prefix, known = model.base_model_prefix, model.state_dict()
    return {name: rename_source_key(name, renamings, converters, prefix, known) for name in stored}
