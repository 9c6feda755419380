"""Models opened by name: a product of a run, its teacher, a path, a shipped name or a Hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmmamba_cli.checkpoint import (
    AnyCheckpoint,
    Checkpoint,
    InPlaceCheckpoint,
    open_any_checkpoint,
    shipped_models,
)
from mmmamba_cli.checkpoint.checkpoint import NOT_YET_HINT, NOT_YET_IN_PLACE
from mmmamba_cli.checkpoint.prompt_files import FILES_OF, missing_prompt_files
from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.recipe import plan_kind
from mmmamba_cli.runs.manifest import MANIFEST, Manifest, read_manifest
from mmmamba_cli.runs.run import Run

if TYPE_CHECKING:
    import torch

    from mmmamba_cli.model import HolisticVLM
    from mmmamba_cli.processing import (
        HolisticTextProcessor,
        HolisticVLMProcessor,
        TeacherProcessor,
    )

TEACHER = "teacher"


@dataclass(frozen=True)
class ResolvedModel:
    """An opened checkpoint under its name. Only headers are read, without torch, until `load`.

    `checkpoint` is what is `opened`, for commands that know only models of class `HolisticVLM`.
    """

    name: str
    opened: AnyCheckpoint
    origin: Literal["product", "teacher", "path"]
    # The run of a product or teacher, None for a path.
    run: Run | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of a `HolisticVLM`. Raises `CheckpointError` for any other model."""
        if isinstance(self.opened, InPlaceCheckpoint):
            if self.opened.is_student:
                raise CheckpointError(f"{self.opened.path} {NOT_YET_IN_PLACE}", NOT_YET_HINT)
            raise CheckpointError(
                f"{self.opened.path} is a model of transformers ({self.opened.model_type}), which "
                "this command does not take yet",
                NOT_YET_HINT,
            )
        return self.opened

    @cached_property
    def manifest(self) -> Manifest | None:
        """The product's manifest; None for a teacher and for a folder that has none."""
        if self.origin == TEACHER or not (self.opened.path / MANIFEST).is_file():
            return None
        return read_manifest(self.opened.path)

    @property
    def kind(self) -> str:
        """The layer plan in words: `linear`, `hybrid (4 attention)` or `all attention`."""
        if self.manifest is not None:
            return self.manifest.kind
        if isinstance(self.opened, InPlaceCheckpoint):
            return plan_kind(len(self.opened.attention_layers), self.opened.num_layers)
        config = self.opened.architecture
        return plan_kind(len(config.attention_layers), config.num_hidden_layers)

    @property
    def has_vision(self) -> bool:
        """Whether the model reads pictures."""
        if isinstance(self.opened, InPlaceCheckpoint):
            return self.opened.has_vision
        return self.opened.architecture.vision is not None

    @property
    def final(self) -> bool | None:
        """Whether the model was distilled end to end; None without a manifest."""
        return None if self.manifest is None else self.manifest.final

    @property
    def content_hash(self) -> str | None:
        """The hash that the run recorded; None for a path, whose tensors nothing vouches for."""
        if self.run is None:
            return None
        if self.origin == TEACHER:
            return self.run.teacher.content_hash
        return None if self.manifest is None else self.manifest.content_hash

    def verify(self) -> None:
        """Read all tensors and raise `RunError` unless they are those that the run recorded."""
        if self.run is None:
            return
        if self.origin == TEACHER:
            self.run.verify_teacher(self.opened)
        else:
            self.run.verify_product(self.name)

    def require_processor(
        self, purpose: str, hint: str
    ) -> HolisticVLMProcessor | HolisticTextProcessor:
        """Open the processor. Raises `CheckpointError` if the checkpoint has no tokenizer.

        `purpose` completes "it cannot be ..." in the message.
        """
        from mmmamba_cli.runs.product import open_processor

        processor = open_processor(self.checkpoint)
        if processor is None:
            raise CheckpointError(
                f"{self.checkpoint.path} has no tokenizer, so it cannot be {purpose}", hint
            )
        return processor

    def load(
        self, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto"
    ) -> HolisticVLM:
        """Load the model in eval mode, without gradients.

        `device` None is CUDA where there is one; dtype "auto" is bf16 there, and fp32 on a CPU.
        Raises `MmmambaError` for a device that is not there, `CheckpointError` for an unknown dtype
        or damaged tensors.
        """
        from mmmamba_cli.checkpoint import load_model

        device, dtype = pick_placement(device, dtype)
        checkpoint = self.checkpoint
        return load_model(
            checkpoint.path, device=device, dtype=dtype, frozen=True, checkpoint=checkpoint
        )


def open_training_processor(
    checkpoint: AnyCheckpoint,
) -> HolisticVLMProcessor | HolisticTextProcessor | TeacherProcessor | None:
    """The processor that prepares training data of a model; None if it has no tokenizer.

    Raises:
        CheckpointError: its files are missing or do not match, or it needs a package that is not
            installed.
    """
    if isinstance(checkpoint, InPlaceCheckpoint):
        for name in missing_prompt_files(checkpoint):
            raise CheckpointError(
                f"{checkpoint.path} has no {name}, which makes the prompts of training data",
                f"add {FILES_OF[name]} from where the teacher came from",
            )
        from mmmamba_cli.processing import open_teacher_processor
        from mmmamba_cli.teachers import packing_problem

        packs_rows = packing_problem(checkpoint.config) is None
        return open_teacher_processor(checkpoint.folder, packs_rows)
    from mmmamba_cli.runs.product import open_processor

    return open_processor(checkpoint)


def pick_placement(
    device: str | torch.device | None, dtype: str | torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that a command loads to. Defaults and errors as in `load`."""
    from mmmamba_cli.checkpoint import parse_dtype, pick_dtype
    from mmmamba_cli.devices import pick_device

    chosen = pick_device(device)
    return chosen, pick_dtype(dtype, chosen) if isinstance(dtype, str) else parse_dtype(dtype)


def resolve_model(run: Run, name: str | Path, teacher_path: Path | None = None) -> ResolvedModel:
    """Open a product of the run by its name, its `teacher`, or a checkpoint from elsewhere.

    A name that the run does not have is read as a path, a shipped model or a Hub id; a `Path`
    always is. Raises `RunError` or `CheckpointError` if there is no such model.
    """
    if isinstance(name, Path):
        return resolve_path(name)
    if name == TEACHER:
        return resolve_teacher(run, teacher_path)
    elsewhere = "/" in name or Path(name).exists() or name in shipped_models()
    if not run.exists or (elsewhere and name not in run.products()):
        return resolve_path(Path(name))
    return resolve_product(run, name)


def resolve_product(run: Run, name: str | None = None) -> ResolvedModel:
    """Open a product of the run, the current one if `name` is None. Raises `RunError`."""
    name = name or run.record.current
    # Checks that the folder, its manifest and the name agree.
    run.product(name)
    return ResolvedModel(name, run.open_any_product(name), "product", run)


def resolve_teacher(run: Run, moved_to: Path | None = None) -> ResolvedModel:
    """Open the run's teacher. Raises `RunError` if it has none or it is no longer there."""
    return ResolvedModel(TEACHER, run.open_any_teacher(moved_to), "teacher", run)


def resolve_path(path: Path) -> ResolvedModel:
    """Open a checkpoint by path, shipped name or Hub id; it is called as its folder or file stem.

    Raises `CheckpointError`.
    """
    checkpoint = open_any_checkpoint(path)
    name = path.resolve().stem if path.is_file() else path.resolve().name
    return ResolvedModel(name, checkpoint, "path")


def check_unique_names(names: Sequence[str], consequence: str = "", *, hint: str) -> None:
    """Raise `DataError` if two models have one name."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise DataError(f"more than one model is called {', '.join(twice)}{consequence}", hint)
