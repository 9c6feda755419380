"""Export of a checkpoint: weights in another layout, sidecar files, model card, Hub upload.

An export records its files in `mmmamba_export.json`; a later export replaces a folder only if it
has exactly the recorded files, unchanged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch

from mmmamba_cli import __version__
from mmmamba_cli.checkpoint import (
    DTYPE_TENSOR,
    Checkpoint,
    ShardedWriter,
    TensorHasher,
    TensorInfo,
    atomic_folder,
    checked_reader,
)
from mmmamba_cli.checkpoint.atomic import check_replaceable, folder_entries
from mmmamba_cli.checkpoint.name_map import foreign_tensors
from mmmamba_cli.checkpoint.resolve import check_repository_id
from mmmamba_cli.checkpoint.writer import MAX_SHARD_BYTES
from mmmamba_cli.errors import CheckpointError, RunError
from mmmamba_cli.export.layouts import HUB, Layout, make_layout
from mmmamba_cli.export.model_card import CardInfo, card_text, redact_manifest
from mmmamba_cli.export.sidecar_files import write_sidecar_files
from mmmamba_cli.runs.manifest import MANIFEST, manifest_text
from mmmamba_cli.runs.provenance import Provenance, provenance_of, redact_text

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


LOGIN_HINT = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class ExportResult:
    """A finished export. `content_hash` is over the tensors under the format's names."""

    folder: Path
    format: str
    dtype: str
    tensors: int
    nbytes: int
    content_hash: str


def export_checkpoint(
    checkpoint: Checkpoint,
    name: str,
    target: Path,
    *,
    card: CardInfo | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] | None = None,
) -> ExportResult:
    """Write `checkpoint` in format `name` (one of `FORMATS`) to folder `target`, atomically.

    `card` is the content of the model card. `dtype` None keeps the stored dtypes. `advance` is
    called with the number of bytes written.

    Raises:
        CheckpointError: if the format cannot represent the model, a tensor has NaN or infinity, the
            target exists and `overwrite` is false, or the target has files of no export.
        RunError: if the tensors are not those of the card's manifest.
    """
    if checkpoint.path.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(
            f"{target} holds what is being exported, {checkpoint.path}", "write to another folder"
        )
    layout = make_layout(checkpoint, name, dtype)
    plan = planned_tensors(layout)
    body = layout.dtype(DTYPE_TENSOR)
    card = card or CardInfo()

    def check(found: Path) -> None:
        check_replaceable(found, unrecorded_files, "mmmamba export")

    with atomic_folder(target, overwrite, check) as folder:
        with (
            TensorHasher() as hasher,
            ShardedWriter(folder, plan, max_shard_bytes) as writer,
        ):
            for key, tensor in foreign_tensors(layout.name_map, checked_reader(checkpoint, hasher)):
                writer.write(key, tensor, cast=True)
                if advance is not None:
                    advance(plan[key].nbytes)
            content_hash = writer.finish()
            _check_unchanged(checkpoint, card, hasher.result())
        write_sidecar_files(folder, checkpoint, layout, body, _provenance(checkpoint, card))
        found = ExportResult(
            folder=target,
            format=name,
            dtype=str(body).removeprefix("torch."),
            tensors=len(plan),
            nbytes=sum(info.nbytes for info in plan.values()),
            content_hash=content_hash,
        )
        if name == HUB and card.manifest is not None:
            manifest = redact_manifest(card.manifest, found.dtype, content_hash)
            (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
        (folder / CARD_FILE).write_text(
            card_text(checkpoint, name, found.dtype, _parameters(layout), card), encoding="utf-8"
        )
        write_record(folder, name)
    return found


def push_to_hub(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder to a model repository, created if missing; returns the repository's URL.

    huggingface_hub provides the token. Raises `CheckpointError` if the Hub refuses or cannot be
    reached, without the Hub's own message: it may quote the request.
    """
    import huggingface_hub
    from huggingface_hub import errors

    check_repository_id(repository)
    try:
        place = huggingface_hub.create_repo(repository, private=private, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message="mmmamba export"
        )
    except errors.LocalTokenNotFoundError as error:
        raise CheckpointError(f"{folder} was not pushed: there is no token", LOGIN_HINT) from error
    except (OSError, ValueError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code in (401, 403):
            raise CheckpointError(
                f"{folder} was not pushed: the Hub does not let you write to {repository}",
                LOGIN_HINT,
            ) from error
        told = type(error).__name__ if code is None else f"status {code}"
        raise CheckpointError(
            f"{folder} was not pushed: the Hugging Face Hub could not be written to ({told})",
            "the folder is complete; push it again with `hf upload`",
        ) from error
    return str(place)


def export_bytes(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> int:
    """Bytes of the tensors that `export_checkpoint` would write."""
    plan = planned_tensors(make_layout(checkpoint, name, dtype))
    return sum(info.nbytes for info in plan.values())


def planned_tensors(layout: Layout) -> dict[str, TensorInfo]:
    """Tensors to write, by the format's names; a fused tensor has the dtype of its first part."""
    return {
        key: TensorInfo.of(layout.dtype(next(iter(mapping.native))), shape)
        for mapping in layout.name_map
        for key, shape in mapping.foreign.items()
    }


def _provenance(checkpoint: Checkpoint, card: CardInfo) -> Provenance:
    manifest = card.manifest
    if manifest is None:
        return provenance_of(checkpoint)
    return Provenance(manifest.stages, manifest.final, tuple(map(redact_text, manifest.notes)))


def _check_unchanged(checkpoint: Checkpoint, card: CardInfo, content_hash: str) -> None:
    if card.manifest is not None and card.manifest.content_hash != content_hash:
        raise RunError(
            f"{checkpoint.path} was changed since it was written",
            "make it again with --overwrite, or export another product with --from",
        )


def _parameters(layout: Layout) -> int:
    """Number of parameters that the forward pass uses."""
    return sum(
        prod(shape)
        for mapping in layout.name_map
        for key, shape in mapping.native.items()
        if not key.startswith("unused.")
    )
