"""The model and the processor of a transformers folder, a teacher's or a student's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from mmmamba_cli.checkpoint.in_place_checkpoint import InPlaceCheckpoint
from mmmamba_cli.checkpoint.prompt_files import missing_prompt_files
from mmmamba_cli.checkpoint.tensor_info import parse_dtype_name, torch_dtype
from mmmamba_cli.devices import check_device
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.processing.quiet_loading import quiet_loading
from mmmamba_cli.teachers.anatomy import teacher_class
from mmmamba_cli.teachers.auto_class import register_model, teacher_config_class


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
    with quiet_loading():
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
    if missing_prompt_files(checkpoint):
        return None
    folder, config_class = checkpoint.path, _teacher_config_class(checkpoint)
    is_text_only = not needs_processor(checkpoint)
    try:
        with quiet_loading():
            if is_text_only:
                # The class of the tokenizer depends on the teacher's model_type.
                return AutoTokenizer.from_pretrained(folder, config=config_class())
            return PROCESSOR_MAPPING[config_class].from_pretrained(folder)
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


def needs_processor(checkpoint: InPlaceCheckpoint) -> bool:
    """Whether prompts of the family are made by a processor, not by a tokenizer alone."""
    return _teacher_config_class(checkpoint) in PROCESSOR_MAPPING


def _teacher_config_class(checkpoint: InPlaceCheckpoint) -> Any:
    config_class: Any = type(checkpoint.config)
    return teacher_config_class(config_class) if checkpoint.is_student else config_class


def _first(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]
