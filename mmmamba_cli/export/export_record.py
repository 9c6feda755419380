"""The record of an export, `mmmamba_export.json`: its layout, and each file by size and hash.

A later export replaces a folder only if it has exactly the recorded files, unchanged.
"""

from __future__ import annotations

import hashlib
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmmamba_cli import __version__
from mmmamba_cli.checkpoint.atomic_writes import folder_entries

RECORD_FILE = "mmmamba_export.json"
CARD_FILE = "README.md"
# Larger files are weights and are compared by size: hashing would read all of them.
MAX_HASHED_BYTES = 16 << 20
# Last line of the card of older exports, which have no record.
CARD_SIGNATURE = re.compile(r"^Written by mmmamba \S+\.$", re.MULTILINE)
OLD_EXPORT_FILES = (
    CARD_FILE,
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "configuration_mmmamba.py",
    "generation_config.json",
    "manifest.json",
    "mmmamba_*.py",
    "model-*-of-*.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_mmmamba.py",
    "processing_mmmamba.py",
    "processing_mmmamba_text.py",
    "processor_config.json",
    "source_config.json",
    "special_tokens_map.json",
    "tokenization_mmmamba.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def write_record(folder: Path, layout: str) -> None:
    """Write the record of a finished export into its folder."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    record = {"format": 1, "mmmamba": __version__, "layout": layout, "files": files}
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def unrecorded_files(folder: Path) -> list[str]:
    """Entries of `folder` that its export did not write, or that have changed since.

    All entries, if the folder is not an export.
    """
    files = _read_record(folder)
    if files is None:
        card = folder / CARD_FILE
        is_export = card.is_file() and CARD_SIGNATURE.search(_read_text(card)) is not None
        known = OLD_EXPORT_FILES if is_export and (folder / "config.json").is_file() else ()
        return [n for n in folder_entries(folder) if not any(fnmatchcase(n, one) for one in known)]
    found = []
    for name in folder_entries(folder):
        if name == RECORD_FILE:
            continue
        if name not in files:
            found.append(name)
        elif _describe(folder / name) != files[name]:
            found.append(f"{name} (changed since)")
    return found


def _describe(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size > MAX_HASHED_BYTES:
        return {"bytes": size}
    return {"bytes": size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The recorded files; None without a readable record."""
    try:
        value = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8-sig"))
        files = value["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files if isinstance(files, dict) else None


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig", errors="replace")
