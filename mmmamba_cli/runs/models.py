"""Models by what people call them: a product of the run, its teacher, or a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmmamba_cli.checkpoint import Checkpoint, open_checkpoint, shipped_models
from mmmamba_cli.recipe import plan_kind
from mmmamba_cli.runs.manifest import MANIFEST, read_manifest
from mmmamba_cli.runs.run import Run

TEACHER = "teacher"


@dataclass(frozen=True)
class Named:
    """An opened checkpoint under the name it is called by; nothing of it was read but headers.

    `kind` is what its layers make it: `linear`, `hybrid (4 attention)` or `all attention`.
    `final` is None where nobody says whether it was distilled end to end.
    """

    name: str
    checkpoint: Checkpoint
    kind: str
    final: bool | None = None


def open_named(run: Run, name: str | Path, teacher_path: Path | None = None) -> Named:
    """A product of the run by its name, or `teacher`; a `Path` is a path, whatever the run has.

    A name that the run does not have is taken for a path, a shipped model or an id on the Hub.
    Raises `RunError` or `CheckpointError` if there is none such.
    """
    if isinstance(name, Path):
        return open_path(name)
    if name == TEACHER:
        teacher = run.open_teacher(teacher_path)
        return Named(name, teacher, _kind(teacher))
    if not run.exists:
        return open_path(Path(name))
    if name not in run.products() and (
        "/" in name or Path(name).exists() or name in shipped_models()
    ):
        return open_path(Path(name))
    manifest = run.product(name)
    return Named(name, run.open_product(name), manifest.kind, manifest.final)


def open_path(path: Path) -> Named:
    """A checkpoint by its path, its name among the shipped ones, or its id on the Hub."""
    checkpoint = open_checkpoint(path)
    if (checkpoint.path / MANIFEST).is_file():
        manifest = read_manifest(checkpoint.path)
        return Named(path_name(path), checkpoint, manifest.kind, manifest.final)
    return Named(path_name(path), checkpoint, _kind(checkpoint))


def _kind(checkpoint: Checkpoint) -> str:
    config = checkpoint.architecture
    return plan_kind(len(config.attention_layers), config.num_hidden_layers)


def path_name(path: Path) -> str:
    """What a checkpoint from elsewhere is called: as its folder, or its file without the suffix."""
    return path.resolve().stem if path.is_file() else path.resolve().name
