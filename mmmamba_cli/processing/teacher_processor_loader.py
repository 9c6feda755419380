"""The processor of a teacher's folder, for training data."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoProcessor

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.processing.picture_tokens import first_line
from mmmamba_cli.processing.quiet_loading import quiet_loading
from mmmamba_cli.processing.teacher_processor import TeacherProcessor

# Packages that processors of transformers need and transformers does not.
OPTIONAL_PACKAGES = ("torchvision", "num2words", "mistral-common")


def open_teacher_processor(folder: Path, packs_rows: bool = False) -> TeacherProcessor:
    """The processor in the folder of a teacher or its student; a tokenizer where it has no other.

    `packs_rows` says whether its model takes several conversations in a row.

    Raises:
        CheckpointError: there is none, it cannot be read, or it needs a package that is missing.
    """
    try:
        with quiet_loading():
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises plain `Exception` for an unreadable file.
        packages = [name for name in OPTIONAL_PACKAGES if name in str(error).lower()]
        if packages and isinstance(error, ImportError | ValueError):
            raise CheckpointError(
                f"the processor of {folder} needs {' and '.join(packages)}",
                f"pip install {' '.join(packages)}",
            ) from error
        raise CheckpointError(
            f"the processor of {folder} cannot be read: {first_line(error)}",
            "take preprocessor_config.json, processor_config.json and the tokenizer's files from "
            "where the model came from",
        ) from error
    return TeacherProcessor(processor, packs_rows)
