"""Plan of one stage: keep its finished product, resume from a state, or begin at step 1.

While a stage trains, `attempt.json` beside its states records the product that it will replace.
This distinguishes a product that an interrupted `--overwrite` has not replaced yet from the product
that the interrupted command wrote just before it ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.distill.training_settings import (
    Digests,
    diff_settings,
    product_settings,
    result_settings,
    same_held_out_loss,
    stage_settings,
)
from mmmamba_cli.distill.training_state import STATE_FILE, Progress, StateFolder
from mmmamba_cli.errors import RunError
from mmmamba_cli.recipe import Recipe, Stage
from mmmamba_cli.runs import Manifest, Run
from mmmamba_cli.runs.manifest import read_json_as

ATTEMPT_FILE = "attempt.json"
OVERWRITE_FILE = "overwrite.json"


class AttemptRecord(BaseModel):
    """Contents of `attempt.json`. `replaces` is `created` of the product to be replaced, if any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    replaces: str | None


@dataclass(frozen=True)
class DistillOptions:
    """Options of `distill` that are not part of the recipe."""

    teacher: Path | None = None
    # Repeat finished stages; resume a repetition that was interrupted.
    overwrite: bool = False
    # Resume although the settings have changed.
    force: bool = False
    # Begin every stage at step 1, whatever states and products exist.
    restart: bool = False
    # What each of several processes holds: "auto", "replicate" or "shard".
    parallel: str = "auto"
    # Stop where `data.batching` is packed and the student's rows cannot be; else they are bucketed.
    require_packed: bool = False
    # Share of the device's memory that `checkpointing: auto` plans with; other processes of the
    # device have the rest.
    memory_share: float = 1.0


@dataclass(frozen=True)
class StageRequest:
    """A stage to run, with its settings.

    `repeated` is `created` of the product if this command repeated the stage before it was
    interrupted.
    """

    name: str
    parent: Manifest
    stage: Stage
    settings: Mapping[str, Any]
    options: DistillOptions = DistillOptions()
    repeated: str | None = None


@dataclass(frozen=True)
class StagePlan:
    """The decision about a stage.

    `finished` is its product if there is nothing to train; with `from_states`, the interrupted
    command wrote it, and its metrics are not copied yet. Otherwise training resumes after
    `progress`. `overwrite` allows an existing product to be replaced; `replaces` is its `created`.
    """

    finished: Manifest | None = None
    from_states: bool = False
    progress: Progress = field(default_factory=Progress)
    overwrite: bool = False
    replaces: str | None = None
    messages: tuple[str, ...] = ()


def plan_stage(run: Run, states: StateFolder, request: StageRequest) -> StagePlan:
    """Decide what to do about a stage, changing nothing. Called on process 0 only.

    Raises:
        RunError: the stage is finished or begun with other settings or another parent, or is
            finished and a repetition of it was interrupted, and the options do not allow it.
    """
    product, options = run.products().get(request.name), request.options
    steps = states.steps()
    newest = steps[-1] if steps else None
    messages = [
        f"ignored: {states.folder / name} was not written to its end"
        for name in states.incomplete()
    ]
    if options.restart:
        return _plan_first_step(product, messages)
    from_states = product is not None and _wrote_product(states, product, newest)
    if product is not None and (
        from_states or not options.overwrite or product.created == request.repeated
    ):
        if not from_states and newest is not None and not options.overwrite:
            raise RunError(
                f"{request.name} is finished, and a repetition of it with --overwrite was "
                f"interrupted after step {newest} of {request.stage.steps}",
                f"go on with --overwrite, or keep the finished one and remove {states.folder}",
            )
        mismatch = _find_mismatch(product, request)
        if mismatch is None:
            message = f"{request.name} is finished already; --overwrite repeats it"
            return StagePlan(product, from_states, messages=(*messages, message))
        if not options.overwrite:
            raise mismatch
        return _plan_first_step(product, messages)
    if newest is None:
        return _plan_first_step(product, messages)
    return _plan_resume(states, product, request, newest, messages)


def _plan_first_step(product: Manifest | None, messages: list[str]) -> StagePlan:
    replaces = None if product is None else product.created
    return StagePlan(overwrite=product is not None, replaces=replaces, messages=tuple(messages))


def _plan_resume(
    states: StateFolder,
    product: Manifest | None,
    request: StageRequest,
    newest: int,
    messages: list[str],
) -> StagePlan:
    record = states.read_record(states.path(newest).name)
    changed = diff_settings(record.settings, request.settings)
    if changed and not request.options.force:
        if request.options.overwrite:
            messages.append(
                f"beginning at step 1: the state after step {newest} was made with other settings: "
                + "; ".join(changed)
            )
            return _plan_first_step(product, messages)
        raise RunError(
            "the training state to resume was made with other settings: " + "; ".join(changed),
            "go on with these settings by --force, begin at step 1 with --overwrite, or take the "
            "old settings",
        )
    progress = record.progress
    if not same_held_out_loss(record.settings, request.settings):
        # Other losses, or losses on other samples, are not comparable.
        progress.best_step = progress.best_loss = None
    best = progress.best_step
    if best is not None and not (states.folder / states.best_name(best) / STATE_FILE).is_file():
        raise RunError(
            f"{states.folder} lacks {states.best_name(best)}, "
            "the student of the lowest held-out loss",
            "begin at step 1 with --restart",
        )
    attempt = _read_attempt(states)
    replaces = product is not None or (attempt is not None and attempt.replaces is not None)
    messages.append(f"resuming after step {newest}")
    return StagePlan(progress=progress, overwrite=replaces, messages=tuple(messages))


def _wrote_product(states: StateFolder, product: Manifest, newest: int | None) -> bool:
    """Whether the training whose states still exist wrote the product."""
    attempt = _read_attempt(states)
    if attempt is not None:
        return attempt.replaces != product.created
    if newest is None:
        # Older versions removed the states before the metrics.
        return states.folder.is_dir()
    # Older versions removed the states before a stage was repeated.
    record = states.read_record(states.path(newest).name)
    return newest == product.metrics.get("step") and record.written <= product.created


def _find_mismatch(product: Manifest, request: StageRequest) -> RunError | None:
    """The difference between a finished product and the request, as an error; None if none."""
    origin = None if product.derived_from is None else product.derived_from.content_hash
    parent, stage = request.parent, request.stage
    if origin != parent.content_hash or product.stages[-1:] != (stage.name,):
        return RunError(
            f"there is a product {product.name!r} already, made from another parent than "
            f"{parent.name!r} as it is now",
            "replace it with --overwrite, or choose another --run",
        )
    settings = product_settings(product, stage, parent)
    changed = [] if settings is None else diff_settings(settings, request.settings)
    if not changed:
        return None
    return RunError(
        f"{product.name} is finished, and was made with other settings: " + "; ".join(changed),
        "repeat it with --overwrite, take the old settings, or name later stages with --stage",
    )


def _read_attempt(states: StateFolder) -> AttemptRecord | None:
    file = states.folder / ATTEMPT_FILE
    return read_json_as(file, AttemptRecord) if file.is_file() else None


class _OverwriteRecord(BaseModel):
    """Contents of `overwrite.json`. `done` maps each repeated product to its `created`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    command: str
    done: dict[str, str] = {}


class OverwriteLog:
    """The stages that an unfinished `distill --overwrite` has repeated, kept in `folder`.

    Without it, a command that is interrupted in its second stage and run again would repeat the
    first stage, and a job that is requeued at every time limit would never end.
    """

    def __init__(self, folder: Path, command: str, restart: bool):
        self._file = folder / OVERWRITE_FILE
        if restart:
            self.remove()
        known = read_json_as(self._file, _OverwriteRecord) if self._file.is_file() else None
        self._record = _OverwriteRecord(command=command)
        if known is not None and known.command == command:
            self._record = known

    def created(self, product: str) -> str | None:
        """`created` of a product that this command has repeated, or None."""
        return self._record.done.get(product)

    def add(self, product: Manifest) -> None:
        """Record that a product has been repeated."""
        done = {**self._record.done, product.name: product.created}
        self._record = self._record.model_copy(update={"done": done})
        self._file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self._file, self._record.model_dump_json(indent=2) + "\n")

    def remove(self) -> None:
        """Remove the file once the command is finished: run again, it repeats every stage."""
        self._file.unlink(missing_ok=True)


def command_digest(
    recipe: Recipe,
    stages: Sequence[Stage],
    start: Manifest,
    digests: Mapping[str, Digests | None],
) -> str:
    """SHA-256 that is equal for commands of the same stages, settings and first parent.

    `digests` are those of each stage's data, by the stage's name.
    """
    settings = [
        result_settings(stage_settings(recipe, stage, start, digests[stage.name]))
        for stage in stages
    ]
    plan = recipe.layers.model_dump(mode="json")
    return hashlib.sha256(json.dumps([settings, plan], sort_keys=True).encode()).hexdigest()
