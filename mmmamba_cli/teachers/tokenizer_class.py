"""The class of a teacher's tokenizer, which its student's folder has to name.

`AutoTokenizer` knows for each model_type whether the class that tokenizer_config.json names is to
be believed: SmolVLM's, for example, is not. It knows nothing of a student's model_type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mmmamba_cli.processing.quiet_loading import quiet_loading
from mmmamba_cli.teachers.auto_class import student_plan, teacher_config_class

TOKENIZER_CONFIG = "tokenizer_config.json"
# Made of files of another format where a library is installed, else of tokenizer.json.
CHOSEN_BY_LIBRARY = frozenset({"MistralCommonBackend"})


def tokenizer_class_name(folder: Path, config: Any) -> str | None:
    """The class that `AutoTokenizer` takes for the teacher, of the tokenizer in `folder`.

    `config` is a teacher's or a student's. None without a tokenizer_config.json, and where the
    class depends on the libraries that are installed.

    Raises:
        OSError, ValueError: the tokenizer cannot be read.
    """
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    config_class = type(config)
    if student_plan(config) is not None:
        config_class = teacher_config_class(config_class)
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config_class())
    name = type(tokenizer).__name__
    return None if name in CHOSEN_BY_LIBRARY else name
