"""Files that the folder of a transformers model has for its prompts. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmmamba_cli.checkpoint.in_place_checkpoint import InPlaceCheckpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
# Files whose field `chat_template` holds one.
TEMPLATE_CONFIGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
TOKENIZER, PROCESSOR, TEMPLATE = "tokenizer", "processor", "chat template"
FILES_OF = {
    TOKENIZER: f"one of {', '.join(TOKENIZER_FILES)}",
    PROCESSOR: f"one of {', '.join(PROCESSOR_FILES)}",
    TEMPLATE: TEMPLATE_FILES[0],
}


def missing_prompt_files(checkpoint: InPlaceCheckpoint) -> list[str]:
    """What a folder does not have for prompts: "tokenizer", or "processor" of pictures."""
    names = {file.name for file in checkpoint.folder.iterdir()}
    if names.isdisjoint(TOKENIZER_FILES):
        return [TOKENIZER]
    has_processor = not names.isdisjoint(PROCESSOR_FILES)
    return [PROCESSOR] if checkpoint.has_vision and not has_processor else []


def missing_chat_files(checkpoint: InPlaceCheckpoint) -> list[str]:
    """What a folder does not have for conversations: see above, or "chat template"."""
    missing = missing_prompt_files(checkpoint)
    return missing or ([] if _has_chat_template(checkpoint.folder) else [TEMPLATE])


def _has_chat_template(folder: Path) -> bool:
    # Mistral's own tokenizer renders conversations itself.
    if any((folder / name).exists() for name in (*TEMPLATE_FILES, "tekken.json")):
        return True
    return any(_fields(folder / name).get("chat_template") for name in TEMPLATE_CONFIGS)


def _fields(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if it cannot be read, which its reader says better."""
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
