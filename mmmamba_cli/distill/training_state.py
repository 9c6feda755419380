"""Training states on disk.

A state is a folder `step-NNNNNNNN` of torch.distributed.checkpoint files (master weights and AdamW
moments by parameter name) with `state.json` (progress and settings). States are written atomically
and can be read by any number of processes. A state is resumed only if the settings that affect the
result are the same.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ConfigDict, TypeAdapter, with_config
from torch import nn

from mmmamba_cli.checkpoint import atomic_folder
from mmmamba_cli.distill.training_state_reader import (
    DAMAGE_ERRORS,
    HINT,
    StateReader,
    damaged_state,
)
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import RunError

STATE_FILE = "state.json"
STEP_FOLDER = re.compile(r"step-(\d{8})")
BEST = "best"
STATE_FOLDER = re.compile(rf"(step|{BEST})-\d{{8}}")


@with_config(ConfigDict(extra="forbid"))
@dataclass
class Progress:
    """Progress of a stage; `step` counts the steps done."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    bad_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    # The last held-out metrics, with their step.
    held_out: dict[str, Any] = field(default_factory=dict)
    # The decision of `checkpointing: auto`; None for other settings.
    recomputation: dict[str, Any] | None = None
    # The result of step `step` if its evaluation on held-out data is due.
    unevaluated: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields; `recomputation` and `unevaluated` only if they are not None."""
        fields = asdict(self)
        for name in ("recomputation", "unevaluated"):
            if fields[name] is None:
                del fields[name]
        return fields


@dataclass(frozen=True)
class StateRecord:
    """Contents of `state.json`; `written` is its time, in the format of a manifest's `created`."""

    progress: Progress
    settings: dict[str, Any]
    written: str


class StateFolder:
    """The folder with the training states of one stage."""

    def __init__(self, folder: Path, world: World):
        self.folder = folder
        self.world = world

    def steps(self) -> list[int]:
        """Steps of the complete states, in ascending order."""
        if not self.folder.is_dir():
            return []
        found = [
            STEP_FOLDER.fullmatch(p.name)
            for p in self.folder.iterdir()
            if (p / STATE_FILE).is_file()
        ]
        return sorted(int(match[1]) for match in found if match)

    def incomplete(self) -> list[str]:
        """Names of the folders that a crash left incomplete; they are never read."""
        if not self.folder.is_dir():
            return []
        return sorted(
            p.name
            for p in self.folder.iterdir()
            if p.is_dir() and (p.name.startswith(".") or not (p / STATE_FILE).is_file())
        )

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer | None,
        record: Mapping[str, Any],
    ) -> None:
        """Write a state as `name`, replacing an existing one. Call it on all processes.

        Raises `OSError` with ENOSPC if the disk is full.
        """
        tensors = _state_dict(parameters, optimiser)
        with (
            self._atomic_folder_of_all(self.folder / name) as partial,
            _ignore_single_process_warning(),
        ):
            try:
                dcp.save(tensors, checkpoint_id=str(partial), no_dist=self.world.size == 1)
            except (RuntimeError, dcp.CheckpointException) as error:
                # PyTorch's writer reports a full disk as a failed assertion about its position.
                if shutil.disk_usage(self.folder).free >= _num_bytes(tensors):
                    raise
                full = errno.ENOSPC
                raise OSError(full, os.strerror(full), str(self.folder)) from error
            if self.world.is_main:
                text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
                (partial / STATE_FILE).write_text(text, encoding="utf-8")

    def read_record(self, name: str) -> StateRecord:
        """Read `state.json`. Raises `RunError` if it is damaged."""
        file = self.folder / name / STATE_FILE
        try:
            value = json.loads(file.read_text(encoding="utf-8-sig"))
            # Reject lone surrogates (`\ud800`): they cannot be encoded as UTF-8.
            json.dumps(value, ensure_ascii=False).encode()
            progress = TypeAdapter(Progress).validate_python(value["progress"])
            settings = value["settings"]
            if progress.step != int(name[-8:]) or not _is_settings(settings):
                raise ValueError("of another step or stage")
            written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise RunError(
                f"{file} is damaged: it does not say how far the stage had come", HINT
            ) from error
        return StateRecord(progress, settings, written.isoformat(timespec="microseconds"))

    def load(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer | None,
    ) -> None:
        """Read a state into parameters and optimiser, running no code from it.

        Raises:
            RunError: the state is damaged, has other tensors, or contains code.
        """
        tensors, folder = _state_dict(parameters, optimiser), self.folder / name
        reader = StateReader(folder, dict(_shapes(tensors)))
        try:
            with _ignore_single_process_warning():
                dcp.load(tensors, storage_reader=reader, no_dist=self.world.size == 1)
        except dcp.CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            for cause in causes:
                if not isinstance(cause, DAMAGE_ERRORS):
                    raise cause from error
            raise damaged_state(folder) from error
        except DAMAGE_ERRORS as error:
            raise damaged_state(folder) from error

    def best_name(self, step: int) -> str:
        """Folder name of the weights of `step`, where the held-out loss was lowest so far."""
        return f"{BEST}-{step:08d}"

    def prune(self, newest: int, best_step: int | None) -> None:
        """Remove all states except the newest and the best one of its record.

        Call it after saving the newest state: a killed run resumes from a state and needs the best
        one of that state's record.
        """
        if not self.world.is_main:
            return
        kept = {self.path(newest).name, None if best_step is None else self.best_name(best_step)}
        for folder in self.folder.iterdir():
            if STATE_FOLDER.fullmatch(folder.name) and folder.name not in kept:
                shutil.rmtree(folder)

    def clear(self) -> None:
        """Remove the folder; its name is free at once."""
        if not self.world.is_main:
            return
        gone = self.folder.parent / f".{self.folder.name}.removed"
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _atomic_folder_of_all(self, target: Path) -> Iterator[Path]:
        """An atomic folder that all processes write into and process 0 renames into place."""
        if self.world.size == 1:
            with atomic_folder(target, overwrite=True) as partial:
                yield partial
            return
        if self.world.is_main:
            with atomic_folder(target, overwrite=True) as partial:
                self.world.run_on_main(lambda: str(partial))
                yield partial
                self.world.barrier()
        else:
            yield Path(self.world.run_on_main(str))
            self.world.barrier()
        self.world.barrier()


def state_record(progress: Progress, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of `state.json`: progress and settings."""
    return {"format": 1, "progress": progress.as_dict(), "settings": dict(settings)}


def _is_settings(value: Any) -> bool:
    """Whether the value has the sections that `diff_settings` compares."""
    return isinstance(value, dict) and all(
        isinstance(value.get(section), dict) for section in ("stage", "data")
    )


def _shapes(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor names as torch.distributed.checkpoint flattens them, with shapes."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _shapes(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tuple(value.shape)


def _num_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes of all tensors."""
    return sum(
        _num_bytes(value) if isinstance(value, Mapping) else value.numel() * value.element_size()
        for value in tree.values()
    )


@contextmanager
def _ignore_single_process_warning() -> Iterator[None]:
    """Ignore the warning that torch.distributed is disabled, given for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state_dict(
    parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer | None
) -> dict[str, Any]:
    tensors: dict[str, Any] = {"master": {n: p.detach() for n, p in parameters.items()}}
    if optimiser is not None:
        tensors["adamw"] = {n: optimiser.state[p] for n, p in parameters.items()}
    return tensors
