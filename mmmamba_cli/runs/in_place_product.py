"""Products of runs whose students have mixers in the place of their teacher's attention."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from mmmamba_cli.checkpoint import SOURCE_CONFIG, InPlaceCheckpoint, TensorInfo
from mmmamba_cli.checkpoint.checkpoint import read_config
from mmmamba_cli.checkpoint.in_place_checkpoint import with_dtype
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.runs.product import TEACHER_FILES, ProductModel
from mmmamba_cli.teachers import ExpectedTensor, StudentPlan, student_tensors
from mmmamba_cli.teachers.tokenizer_class import TOKENIZER_CONFIG, tokenizer_class_name


def new_tensors(config: Any) -> dict[str, ExpectedTensor]:
    """Tensors of a student's config that its teacher lacks, by their name in the model."""
    return {name: one for name, one in student_tensors(config).items() if one.mixer is not None}


def in_place_model(
    config: Any, origin: InPlaceCheckpoint, dtype: torch.dtype, stored: Mapping[str, str]
) -> ProductModel:
    """The model of a product that is a student of a transformers model.

    Args:
        config: the student's config.
        origin: the teacher, or another student of it, whose files are copied.
        stored: the teacher's tensors: the name in the model by the name on disk. New tensors have
            their names in the model.
    """
    config = with_dtype(config, dtype)
    expected = student_tensors(config)
    tensors = {name: _stored_info(origin, name, own, expected) for name, own in stored.items()}
    for name, one in expected.items():
        if one.mixer is not None:
            tensors[name] = TensorInfo.of(one.dtype, one.shape)
    plan = StudentPlan.from_json(config.mmmamba)
    layers = range(len(plan.mixers))
    return ProductModel(
        tensors=tensors,
        parameters=sum(prod(info.shape) for info in tensors.values()),
        attention_layers=tuple(i for i in layers if i not in plan.linear_layers),
        num_layers=len(layers),
        dtype=dtype,
        write_files=partial(_write_files, config=config, origin=origin),
    )


def _stored_info(
    origin: InPlaceCheckpoint,
    name: str,
    own: str,
    expected: Mapping[str, ExpectedTensor],
) -> TensorInfo:
    """The tensor in the student's dtype; integers, and what no forward reads, keep theirs."""
    info = origin.info(name)
    if own not in expected or not info.dtype.is_floating_point:
        return info
    return TensorInfo.of(expected[own].dtype, info.shape)


def _write_files(folder: Path, config: Any, origin: InPlaceCheckpoint) -> None:
    """Write config.json, the teacher's config.json and copies of the teacher's other files."""
    config.save_pretrained(folder)
    kept = origin.folder / SOURCE_CONFIG
    if kept.is_file():
        shutil.copyfile(kept, folder / SOURCE_CONFIG)
    else:
        text = json.dumps(origin.raw_config, indent=2, ensure_ascii=False) + "\n"
        (folder / SOURCE_CONFIG).write_text(text, encoding="utf-8")
    for file in sorted(origin.folder.iterdir()):
        if file.is_file() and any(fnmatchcase(file.name, one) for one in TEACHER_FILES):
            shutil.copyfile(file, folder / file.name)
    # A tokenizer that cannot be read is no reason to refuse the weights: `chat` names its fault.
    with suppress(CheckpointError):
        name_tokenizer_class(folder, origin)


def name_tokenizer_class(folder: Path, origin: InPlaceCheckpoint) -> None:
    """Write the class that the teacher's tokenizer gets into tokenizer_config.json of `folder`.

    Raises:
        CheckpointError: the tokenizer cannot be read.
    """
    try:
        name = tokenizer_class_name(folder, origin.config)
    except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the tokenizer of {origin.path} cannot be read: {first:.200}",
            "take its files from where the teacher came from",
        ) from error
    if name is None:
        return
    file = folder / TOKENIZER_CONFIG
    values = read_config(file)
    if values.get("tokenizer_class") != name:
        text = json.dumps({**values, "tokenizer_class": name}, indent=2, ensure_ascii=False)
        file.write_text(f"{text}\n", encoding="utf-8")
