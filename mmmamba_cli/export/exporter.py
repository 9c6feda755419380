"""One export: weights tensor by tensor into another layout, what belongs beside them, the card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from mmmamba_cli.checkpoint import (
    Checkpoint,
    ShardedWriter,
    TensorHasher,
    TensorInfo,
    atomic_folder,
    checked_reader,
)
from mmmamba_cli.checkpoint.atomic import check_replaceable
from mmmamba_cli.checkpoint.name_map import foreign_tensors
from mmmamba_cli.checkpoint.writer import MAX_SHARD_BYTES
from mmmamba_cli.errors import CheckpointError, RunError
from mmmamba_cli.export.export_record import CARD_FILE, unrecorded_files, write_record
from mmmamba_cli.export.layouts import DTYPE_TENSOR, HUB, Layout, make_layout
from mmmamba_cli.export.model_card import CardInfo, card_text, redact_manifest
from mmmamba_cli.export.sidecar_files import write_sidecar_files
from mmmamba_cli.runs.manifest import MANIFEST, manifest_text
from mmmamba_cli.runs.provenance import Provenance, provenance_of, redact_text


@dataclass(frozen=True)
class ExportResult:
    """What was written. `content_hash` is over the tensors under the format's own names."""

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
    info: CardInfo | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] | None = None,
) -> ExportResult:
    """Write `checkpoint` in format `name` (one of `FORMATS`) as folder `target`, all or nothing.

    `info` is what the model card tells; `dtype` None keeps what is stored. `advance` is told of
    bytes as they are written. Raises `CheckpointError` if the format cannot hold the model, a
    tensor holds NaN or infinity, or the target exists and `overwrite` is not given or it holds
    anything but an export's own files; `RunError` if the tensors are not those that the info's
    manifest is of.
    """
    if checkpoint.path.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(
            f"{target} holds what is being exported, {checkpoint.path}", "write to another folder"
        )
    layout = make_layout(checkpoint, name, dtype)
    plan = planned_tensors(layout)
    body = layout.dtype(DTYPE_TENSOR)
    info = info or CardInfo()

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
            _check_unchanged(checkpoint, info, hasher.result())
        write_sidecar_files(folder, checkpoint, layout, body, _provenance(checkpoint, info))
        found = ExportResult(
            folder=target,
            format=name,
            dtype=str(body).removeprefix("torch."),
            tensors=len(plan),
            nbytes=sum(info.nbytes for info in plan.values()),
            content_hash=content_hash,
        )
        if name == HUB and info.manifest is not None:
            manifest = redact_manifest(info.manifest, found.dtype, content_hash)
            (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
        (folder / CARD_FILE).write_text(
            card_text(checkpoint, name, found.dtype, _parameters(layout), info), encoding="utf-8"
        )
        write_record(folder, name)
    return found


def planned_tensors(layout: Layout) -> dict[str, TensorInfo]:
    """What will be written, by the format's names; a fused tensor has its first part's dtype."""
    return {
        key: TensorInfo.of(layout.dtype(next(iter(mapping.native))), shape)
        for mapping in layout.name_map
        for key, shape in mapping.foreign.items()
    }


def _provenance(checkpoint: Checkpoint, info: CardInfo) -> Provenance:
    manifest = info.manifest
    if manifest is None:
        return provenance_of(checkpoint)
    return Provenance(manifest.stages, manifest.final, tuple(map(redact_text, manifest.notes)))


def _check_unchanged(checkpoint: Checkpoint, info: CardInfo, content_hash: str) -> None:
    if info.manifest is not None and info.manifest.content_hash != content_hash:
        raise RunError(
            f"{checkpoint.path} was changed since it was written",
            "make it again with --overwrite, or export another product with --from",
        )


def _parameters(layout: Layout) -> int:
    """Parameters that a forward uses."""
    return sum(
        prod(shape)
        for mapping in layout.name_map
        for key, shape in mapping.native.items()
        if not key.startswith("unused.")
    )
