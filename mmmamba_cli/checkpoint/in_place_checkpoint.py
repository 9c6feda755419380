"""Checkpoints of transformers' own models: teachers that are converted in place, their students.

Tensors keep the names that they have on disk. A student's model_type is `mmmamba_` and its
teacher's; its config.json holds the plan of its mixers. Opening reads JSON and headers, without
torch; `layout` checks every tensor by name and shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmamba_cli.checkpoint.checkpoint import (
    KNOWN_MODEL_TYPES,
    NATIVE_MODEL_TYPE,
    Checkpoint,
    open_checkpoint,
    read_config,
)
from mmmamba_cli.checkpoint.gguf_file import is_gguf
from mmmamba_cli.checkpoint.hovle import MODEL_TYPE as HOVLE_MODEL_TYPE
from mmmamba_cli.checkpoint.mmmamba_hf import MODEL_TYPE as PUBLISHED_MODEL_TYPE
from mmmamba_cli.checkpoint.model_names import resolve_path
from mmmamba_cli.checkpoint.name_map import Shape, compare_tensors
from mmmamba_cli.checkpoint.tensor_info import TensorInfo
from mmmamba_cli.checkpoint.tensor_source import TensorSource, open_source
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.teachers import MODEL_TYPE_PREFIX, PLAN_FIELD, StudentPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmmamba_cli.teachers import StoredLayout

CONFIG_FILE = "config.json"
# Model types of classes of this package, which have their own reader.
OWN_MODEL_TYPES = (HOVLE_MODEL_TYPE, PUBLISHED_MODEL_TYPE, NATIVE_MODEL_TYPE)
STUDENT_HINT = "take the config.json that mmmamba wrote beside the weights"


@dataclass(frozen=True)
class InPlaceCheckpoint:
    """An opened folder of a transformers model: a teacher, or a student made in place.

    Attributes:
        path: the folder.
        model_type: of its config.json.
        raw_config: the contents of its config.json.
        source: its tensors, by the names on disk.
        plan: the mixers of a student; None for a teacher.
    """

    path: Path
    model_type: str
    raw_config: Mapping[str, Any]
    source: TensorSource
    plan: StudentPlan | None

    @property
    def folder(self) -> Path:
        return self.path

    @property
    def is_student(self) -> bool:
        return self.plan is not None

    @property
    def has_vision(self) -> bool:
        """Whether the model reads pictures."""
        return self.raw_config.get("vision_config") is not None

    @property
    def num_layers(self) -> int:
        """Number of layers of the text decoder."""
        if self.plan is not None:
            return len(self.plan.mixers)
        from mmmamba_cli.teachers import text_config

        return int(text_config(self.config).num_hidden_layers)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers of the text decoder with the teacher's attention."""
        linear = () if self.plan is None else self.plan.linear_layers
        return tuple(layer for layer in range(self.num_layers) if layer not in linear)

    @cached_property
    def config(self) -> Any:
        """transformers' config. Raises `CheckpointError` for one that it refuses."""
        return _read_transformers_config(self.path, self.model_type)

    @cached_property
    def layout(self) -> StoredLayout:
        """The tensors on disk against those of the model.

        Raises:
            CheckpointError: missing, unexpected or misshaped tensors.
            MmmambaError: a teacher that cannot be converted.
        """
        from mmmamba_cli.teachers import anatomy_of, stored_layout

        if not self.is_student:
            # A quantized teacher has other tensors; its refusal says more than their names.
            anatomy_of(self.config)
        found = stored_layout(self.config, self.source.names)
        shapes = self.shapes
        _refuse_mixer_tensors(self, found)
        title = f"{self.path} is not a complete {self.model_type} checkpoint"
        compare_tensors(found.expected_shapes(shapes), shapes, title)
        return found

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by the names on disk."""
        return {name: self.source.info(name).shape for name in self.source.names}

    def __contains__(self, name: str) -> bool:
        return name in self.source.names

    def info(self, name: str) -> TensorInfo:
        return self.source.info(name)

    def read(self, name: str) -> Tensor:
        """Read a tensor by its name on disk; memory-mapped if the format allows it."""
        return self.source.read(name)

    def foreign_names(self, name: str) -> tuple[str, ...]:
        return (name,)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the weights, by bytes."""
        infos = (self.source.info(name) for name in self.source.names)
        sizes: dict[str, int] = {}
        for info in infos:
            sizes[info.dtype_name] = sizes.get(info.dtype_name, 0) + info.nbytes
        return TensorInfo(max(sizes, key=lambda name: sizes[name]), ()).dtype


AnyCheckpoint = Checkpoint | InPlaceCheckpoint


def open_any_checkpoint(path: str | Path, *, in_place: bool = False) -> AnyCheckpoint:
    """Open a checkpoint of `open_checkpoint`, or a folder of any other transformers model.

    Llama-like language models, which both readers know, are opened by `open_checkpoint` unless
    `in_place`. See there for names and errors.
    """
    resolved = resolve_path(path)
    if in_place or _has_foreign_model(resolved):
        return open_in_place(resolved)
    return open_checkpoint(resolved)


def open_in_place(path: str | Path) -> InPlaceCheckpoint:
    """Open the folder of a transformers model, or of a student of one.

    Raises:
        CheckpointError: no such folder, a format that transformers' classes do not read, a class of
            this package, or a student's folder with the model_type of its teacher.
    """
    path = resolve_path(path)
    if is_gguf(path) or not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder of transformers, which a student in place of its attention "
            f"needs with weights, {CONFIG_FILE} and processor",
            "give the folder that was downloaded from the Hub, or its OWNER/NAME",
        )
    source = open_source(path)
    raw = read_config(path / CONFIG_FILE)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path / CONFIG_FILE}: model_type is {model_type!r:.60}", "check it")
    if model_type in OWN_MODEL_TYPES:
        raise CheckpointError(
            f"{path} has model_type {model_type}, which is not a model of transformers",
            "leave out --in-place",
        )
    return InPlaceCheckpoint(path, model_type, raw, source, _stored_plan(raw, model_type, path))


def _has_foreign_model(path: Path) -> bool:
    """Whether `path` is a folder of a model that `open_checkpoint` does not read."""
    if is_gguf(path) or not path.is_dir() or not (path / CONFIG_FILE).is_file():
        return False
    raw = read_config(path / CONFIG_FILE)
    kind = raw.get("model_type")
    if _has_plan(raw):
        return True
    return isinstance(kind, str) and kind not in KNOWN_MODEL_TYPES


def _has_plan(raw: Mapping[str, Any]) -> bool:
    # Exports of HoVLE's students have their provenance in a field of the same name.
    section = raw.get(PLAN_FIELD)
    return isinstance(section, Mapping) and "mixers" in section


def _stored_plan(raw: Mapping[str, Any], model_type: str, path: Path) -> StudentPlan | None:
    """The plan of a student's config.json; None for a teacher's."""
    is_student = model_type.startswith(MODEL_TYPE_PREFIX)
    if not is_student and not _has_plan(raw):
        return None
    if not is_student:
        raise CheckpointError(
            f"{path / CONFIG_FILE} is a student's with the model_type of its teacher, "
            f"{model_type}: transformers would load the teacher's class and drop the mixers",
            f"set model_type to {MODEL_TYPE_PREFIX}{model_type}",
        )
    if not _has_plan(raw):
        raise CheckpointError(
            f"{path / CONFIG_FILE}: model_type is {model_type}, but its field {PLAN_FIELD} names "
            "no mixers",
            STUDENT_HINT,
        )
    return StudentPlan.from_json(raw[PLAN_FIELD])


def _read_transformers_config(path: Path, model_type: str) -> Any:
    """The config of a folder; code of the folder is never run."""
    from transformers import AutoConfig

    import mmmamba_cli.model  # noqa: F401  registers students
    from mmmamba_cli.teachers import register_model_type

    if model_type.startswith(MODEL_TYPE_PREFIX):
        register_model_type(model_type)
    else:
        _check_known(path, model_type)
    try:
        return AutoConfig.from_pretrained(path)
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path / CONFIG_FILE} cannot be read as a config of {model_type}: {first:.200}",
            "take the config.json that was published with the weights",
        ) from error


def _check_known(path: Path, model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING:
        return
    raise CheckpointError(
        f"{path / CONFIG_FILE}: model_type is {model_type}, which the installed transformers does "
        "not know",
        "update transformers, or take the checkpoint of this model in transformers' own format",
    )


def _refuse_mixer_tensors(checkpoint: InPlaceCheckpoint, layout: StoredLayout) -> None:
    """Raise `CheckpointError` if a teacher's file has tensors of mixers."""
    if checkpoint.is_student:
        return
    known = layout.shapes.keys() | layout.tied.keys() | layout.ignored
    found = [
        name
        for name, own in layout.names.items()
        if own not in known and name not in known and ".self_attn." in own
    ]
    if found:
        raise CheckpointError(
            f"{checkpoint.path} has tensors that the attention of {checkpoint.model_type} lacks, "
            f"such as {found[0]}: it is a student's file with its teacher's config.json, and "
            "transformers would drop them",
            STUDENT_HINT,
        )


def with_dtype(config: Any, dtype: torch.dtype) -> Any:
    """A copy of a config, whose dtype and that of its parts is `dtype`; it names no code."""
    values = {name: value for name, value in config.to_dict().items() if name != "auto_map"}
    copied = type(config).from_dict(values)
    for one in (copied, *(getattr(copied, name, None) for name in copied.sub_configs)):
        if one is not None and getattr(one, "dtype", None) is not None:
            one.dtype = dtype
    copied.dtype = dtype
    return copied


def with_plan(config: Any, plan: StudentPlan) -> Any:
    """A copy of a student's config with another plan."""
    values = {**config.to_dict(), PLAN_FIELD: plan.to_json()}
    return type(config).from_dict(values)


def student_layers(checkpoint: InPlaceCheckpoint) -> dict[str, int]:
    """The layer of each tensor on disk that belongs to a layer's mixer or attention."""
    from mmmamba_cli.teachers import anatomy_of

    anatomy = anatomy_of(checkpoint.config)
    prefix, part = f"{anatomy.layers_path}.", anatomy.attention_name
    found: dict[str, int] = {}
    for name, own in checkpoint.layout.names.items():
        if own.startswith(prefix):
            layer, _, rest = own.removeprefix(prefix).partition(".")
            if rest.startswith(f"{part}."):
                found[name] = int(layer)
    return found
