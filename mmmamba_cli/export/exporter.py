"""Export of a checkpoint: weights in another layout, sidecar files, model card, Hub upload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mmmamba_cli.checkpoint import (
    AnyCheckpoint,
    Checkpoint,
    InPlaceCheckpoint,
    ShardedWriter,
    TensorHasher,
    TensorInfo,
    atomic_folder,
    checked_reader,
)
from mmmamba_cli.checkpoint.atomic_writes import check_replaceable
from mmmamba_cli.checkpoint.model_names import check_repository_id
from mmmamba_cli.checkpoint.name_map import foreign_tensors
from mmmamba_cli.checkpoint.prompt_files import missing_prompt_files
from mmmamba_cli.checkpoint.writer import MAX_SHARD_BYTES
from mmmamba_cli.errors import CheckpointError, RunError
from mmmamba_cli.export.export_record import CARD_FILE, unrecorded_files, write_record
from mmmamba_cli.export.layouts import HUB, Layout, make_layout
from mmmamba_cli.export.model_card import TEACHER_ROLES, CardInfo, card_text, redact_manifest
from mmmamba_cli.export.sidecar_files import write_sidecar_files
from mmmamba_cli.export.student_card import student_card_text
from mmmamba_cli.export.student_files import write_student_files
from mmmamba_cli.export.teacher_licence import find_licence
from mmmamba_cli.runs.manifest import MANIFEST, manifest_text
from mmmamba_cli.runs.provenance import Provenance, provenance_of, redact_text

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
    checkpoint: AnyCheckpoint,
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
    card = card or CardInfo()

    def check(found: Path) -> None:
        check_replaceable(found, unrecorded_files, "mmmamba export")

    with atomic_folder(target, overwrite, check) as folder:
        with (
            TensorHasher() as hasher,
            ShardedWriter(folder, plan, max_shard_bytes, hasher) as writer,
        ):
            for key, tensor in foreign_tensors(layout.name_map, checked_reader(checkpoint, hasher)):
                writer.write(key, tensor, cast=True)
                if advance is not None:
                    advance(plan[key].nbytes)
            content_hash = writer.finish()
            _check_unchanged(checkpoint, card, hasher.result())
        _write_files(folder, checkpoint, layout, card)
        found = ExportResult(
            folder=target,
            format=name,
            dtype=str(layout.body).removeprefix("torch."),
            tensors=len(plan),
            nbytes=sum(info.nbytes for info in plan.values()),
            content_hash=content_hash,
        )
        if name == HUB and card.manifest is not None:
            manifest = redact_manifest(card.manifest, found.dtype, content_hash)
            (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
        write_record(folder, name)
    return found


def _write_files(folder: Path, checkpoint: AnyCheckpoint, layout: Layout, card: CardInfo) -> None:
    """Write the files beside the weights, the model card included."""
    dtype = str(layout.body).removeprefix("torch.")
    if isinstance(checkpoint, InPlaceCheckpoint):
        licence = find_licence(_licence_folders(checkpoint, card))
        write_student_files(folder, checkpoint, layout.body, licence)
        text = student_card_text(checkpoint, dtype, layout.parameters, card, licence)
    else:
        write_sidecar_files(folder, checkpoint, layout, layout.body, _provenance(checkpoint, card))
        text = card_text(checkpoint, layout.name, dtype, layout.parameters, card)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _licence_folders(checkpoint: InPlaceCheckpoint, card: CardInfo) -> list[Path]:
    """Folders that may have the teacher's licence: the student's, and the teacher's own."""
    manifests = card.lineage if card.manifest is None else (*card.lineage, card.manifest)
    parents = (parent for manifest in manifests for parent in manifest.parents)
    teachers = (Path(parent.name) for parent in parents if parent.role in TEACHER_ROLES)
    return [checkpoint.folder, *teachers]


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


def missing_files(checkpoint: AnyCheckpoint) -> list[str]:
    """What a checkpoint does not have for its prompts: "tokenizer", or "processor"."""
    if isinstance(checkpoint, InPlaceCheckpoint):
        return missing_prompt_files(checkpoint)
    return [] if checkpoint.tokenizer_file is not None else ["tokenizer"]


def export_bytes(checkpoint: AnyCheckpoint, name: str, dtype: torch.dtype | None = None) -> int:
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


def _check_unchanged(checkpoint: AnyCheckpoint, card: CardInfo, content_hash: str) -> None:
    if card.manifest is not None and card.manifest.content_hash != content_hash:
        raise RunError(
            f"{checkpoint.path} was changed since it was written",
            "make it again with --overwrite, or export another product with --from",
        )
