"""The model and the processor of a transformers folder, a teacher's or a student's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from mmmamba_cli.checkpoint.in_place import InPlaceCheckpoint
from mmmamba_cli.checkpoint.tensor_info import parse_dtype_name, torch_dtype
from mmmamba_cli.devices import check_device
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.teachers.anatomy import teacher_class
from mmmamba_cli.teachers.auto_class import register_model, teacher_config_class

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_in_place_model(
    checkpoint: InPlaceCheckpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    frozen: bool = False,
) -> PreTrainedModel:
    """Load the model in eval mode by transformers' own loader. See `mmmamba_cli.load`.

    Raises:
        CheckpointError: missing, unexpected or misshaped tensors.
        MmmambaError: the device is not available.
    """
    device = check_device(device)
    # transformers replaces missing tensors by random ones, with a warning only.
    _ = checkpoint.layout
    wanted = dtype
    if isinstance(dtype, str) and dtype != "auto":
        wanted = torch_dtype(parse_dtype_name(dtype))
    config = checkpoint.config
    config_class: Any = type(config)
    model_class: Any = (
        register_model(config_class) if checkpoint.is_student else teacher_class(config_class)
    )
    with _without_progress_bars():
        model: PreTrainedModel = model_class.from_pretrained(
            checkpoint.path, config=config, dtype=wanted
        )
    return model.to(device).requires_grad_(not frozen).eval()


def load_in_place_processor(checkpoint: InPlaceCheckpoint) -> Any:
    """The processor of the teacher's family, or its tokenizer where it reads text only.

    None if the folder has no files of one.

    Raises:
        CheckpointError: files that cannot be read, or a library that they need is missing.
    """
    folder = checkpoint.path
    config_class = type(checkpoint.config)
    if checkpoint.is_student:
        config_class = teacher_config_class(config_class)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    is_text_only = config_class not in PROCESSOR_MAPPING
    has_processor = any((folder / name).is_file() for name in PROCESSOR_FILES)
    if not has_tokenizer or not (is_text_only or has_processor):
        return None
    kind: Any = AutoTokenizer if is_text_only else PROCESSOR_MAPPING[config_class]
    try:
        return kind.from_pretrained(folder)
    except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        # Video processors need torchvision; some errors do not say so.
        if not is_text_only and find_spec("torchvision") is None:
            raise CheckpointError(
                f"the processor of {folder} cannot be opened without torchvision, which "
                "transformers needs for it",
                "pip install torchvision",
            ) from error
        raise CheckpointError(
            f"the processor of {folder} cannot be read: {_first(error)}",
            "take its files from where the teacher came from",
        ) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Turn transformers' progress bars off: they draw over those of the command line."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _first(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]
