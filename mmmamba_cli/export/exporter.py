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
from mmmamba_cli.export.export_record import CARD, strangers, write_record
from mmmamba_cli.export.layouts import BODY, HUB, Layout, layout_of
from mmmamba_cli.export.model_card import Story, card_text, public_manifest
from mmmamba_cli.export.sidecar_files import write_beside
from mmmamba_cli.runs.manifest import MANIFEST, manifest_text
from mmmamba_cli.runs.provenance import Provenance, provenance_of, public_text


@dataclass(frozen=True)
class Exported:
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
    story: Story | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] | None = None,
) -> Exported:
    """Write `checkpoint` in format `name` (one of `FORMATS`) as folder `target`, all or nothing.

    `story` is what the model card tells; `dtype` None keeps what is stored. `advance` is told of
    bytes as they are written. Raises `CheckpointError` if the format cannot hold the model, a
    tensor holds NaN or infinity, or the target exists and `overwrite` is not given or it holds
    anything but an export's own files; `RunError` if the tensors are not those that the story's
    manifest is of.
    """
    if checkpoint.path.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(
            f"{target} holds what is being exported, {checkpoint.path}", "write to another folder"
        )
    layout = layout_of(checkpoint, name, dtype)
    plan = plan_of(layout)
    body = layout.dtype(BODY)
    story = story or Story()

    def check(found: Path) -> None:
        check_replaceable(found, strangers, "mmmamba export")

    with atomic_folder(target, overwrite, check) as folder:
        with (
            TensorHasher() as hasher,
            ShardedWriter(folder, plan, max_shard_bytes) as writer,
        ):
            for key, tensor in foreign_tensors(layout.rules, checked_reader(checkpoint, hasher)):
                writer.write(key, tensor, cast=True)
                if advance is not None:
                    advance(plan[key].nbytes)
            content_hash = writer.finish()
            _check_origin(checkpoint, story, hasher.result())
        write_beside(folder, checkpoint, layout, body, _provenance(checkpoint, story))
        found = Exported(
            folder=target,
            format=name,
            dtype=str(body).removeprefix("torch."),
            tensors=len(plan),
            nbytes=sum(info.nbytes for info in plan.values()),
            content_hash=content_hash,
        )
        if name == HUB and story.manifest is not None:
            manifest = public_manifest(story.manifest, found.dtype, content_hash)
            (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
        (folder / CARD).write_text(
            card_text(checkpoint, name, found.dtype, _parameters(layout), story), encoding="utf-8"
        )
        write_record(folder, name)
    return found


def plan_of(layout: Layout) -> dict[str, TensorInfo]:
    """What will be written, by the format's names; a fused tensor has its first part's dtype."""
    return {
        key: TensorInfo.of(layout.dtype(next(iter(rule.ours))), shape)
        for rule in layout.rules
        for key, shape in rule.foreign.items()
    }


def _provenance(checkpoint: Checkpoint, story: Story) -> Provenance:
    manifest = story.manifest
    if manifest is None:
        return provenance_of(checkpoint)
    return Provenance(manifest.stages, manifest.final, tuple(map(public_text, manifest.notes)))


def _check_origin(checkpoint: Checkpoint, story: Story, content_hash: str) -> None:
    if story.manifest is not None and story.manifest.content_hash != content_hash:
        raise RunError(
            f"{checkpoint.path} was changed since it was written",
            "make it again with --overwrite, or export another product with --from",
        )


def _parameters(layout: Layout) -> int:
    """Parameters that a forward uses."""
    return sum(
        prod(shape)
        for rule in layout.rules
        for key, shape in rule.ours.items()
        if not key.startswith("unused.")
    )
