"""Files beside the weights of a student of another teacher: config, code, processor, licence."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from mmmamba_cli.checkpoint import SOURCE_CONFIG, InPlaceCheckpoint
from mmmamba_cli.checkpoint.in_place_checkpoint import CONFIG_FILE
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.export.student_code import student_auto_map, student_code
from mmmamba_cli.export.teacher_licence import TeacherLicence
from mmmamba_cli.runs.in_place_product import name_tokenizer_class
from mmmamba_cli.runs.product import TEACHER_FILES

# Fields about the place that a file was loaded from.
LOCAL_FIELDS = frozenset(
    {"_commit_hash", "_name_or_path", "auto_map", "is_local", "local_files_only", "name_or_path"}
)
DTYPE_FIELDS = frozenset({"dtype", "torch_dtype"})
# It has no such fields, and megabytes of others.
TOKENIZER_JSON = "tokenizer.json"


def write_student_files(
    folder: Path, checkpoint: InPlaceCheckpoint, dtype: torch.dtype, licence: TeacherLicence
) -> None:
    """Write all files of a student's export except weights, manifest and card.

    Raises:
        CheckpointError: a tokenizer that transformers cannot read.
    """
    assert checkpoint.plan is not None
    config = _without_local_fields(checkpoint.raw_config)
    config = _with_dtype(config, str(dtype).removeprefix("torch."))
    config["auto_map"] = student_auto_map(checkpoint.config)
    _write_json(folder / CONFIG_FILE, config)
    for file in sorted(checkpoint.folder.iterdir()):
        if file.is_file() and any(fnmatchcase(file.name, one) for one in TEACHER_FILES):
            _copy(file, folder / file.name)
    if (checkpoint.folder / SOURCE_CONFIG).is_file():
        _copy(checkpoint.folder / SOURCE_CONFIG, folder / SOURCE_CONFIG)
    name_tokenizer_class(folder, checkpoint)
    for file in licence.files:
        shutil.copyfile(file, folder / file.name)
    for name, text in student_code(checkpoint.config, checkpoint.plan).items():
        (folder / name).write_text(text, encoding="utf-8")


def _copy(file: Path, target: Path) -> None:
    """Copy a file; of JSON, without fields about this machine and code that is not exported."""
    if file.suffix != ".json" or file.name == TOKENIZER_JSON:
        shutil.copyfile(file, target)
        return
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not valid JSON", "take it from where the teacher came from"
        ) from error
    _write_json(target, _without_local_fields(value))


def _without_local_fields(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if key not in LOCAL_FIELDS}
        return {key: _without_local_fields(inner) for key, inner in kept.items()}
    if isinstance(value, list):
        return [_without_local_fields(inner) for inner in value]
    return value


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of a config whose dtype, and that of its parts, is `dtype` wherever it is given."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = _with_dtype(value, dtype)
        else:
            found[key] = dtype if key in DTYPE_FIELDS and value is not None else value
    return found


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
