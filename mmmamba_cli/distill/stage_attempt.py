"""What is to be done about a stage: keep its product, go on from a state, or begin at step 1.

While a stage is trained, `attempt.json` beside its states says which product it will replace. So a
product that an interrupted `--overwrite` has yet to replace is told apart from one that the
interrupted command wrote as its last act.

Which stages an unfinished `distill --overwrite` has repeated already.

Without it, the same command after an interruption in its second stage would repeat the first one
again, and a job that is requeued at every time limit would never end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from mmmamba_cli.checkpoint import atomic_folder, atomic_write_text
from mmmamba_cli.distill.training_state import (
    STATE,
    Digests,
    Progress,
    StateFolder,
    comparable,
    differences,
    product_settings,
    same_held_out,
    settings_of,
)
from mmmamba_cli.errors import RunError
from mmmamba_cli.recipe import Recipe, Stage
from mmmamba_cli.runs import Manifest, Run
from mmmamba_cli.runs.manifest import parse_model

OVERWRITE_LOG = "overwrite.json"


class _Record(BaseModel):
    """The contents of the file. `done` has `created` of each product that was repeated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    command: str
    done: dict[str, str] = {}


class OverwriteLog:
    """The log of one command, in the training folder of its run while the command is unfinished."""

    def __init__(self, run: Run, folder: str, command: str, restart: bool):
        self._file = run.folder / folder / OVERWRITE_LOG
        if restart:
            self.remove()
        known = parse_model(self._file, _Record) if self._file.is_file() else None
        self._record = _Record(command=command)
        if known is not None and known.command == command:
            self._record = known

    def created(self, product: str) -> str | None:
        """`created` of a product that this command has repeated, or None."""
        return self._record.done.get(product)

    def add(self, product: Manifest) -> None:
        """Note that a product is repeated."""
        done = {**self._record.done, product.name: product.created}
        self._record = self._record.model_copy(update={"done": done})
        self._file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self._file, self._record.model_dump_json(indent=2) + "\n")

    def remove(self) -> None:
        """The command is finished: from now on the same command repeats every stage."""
        self._file.unlink(missing_ok=True)


def command_digest(
    recipe: Recipe, stages: Sequence[Stage], start: Manifest, digests: Digests | None
) -> str:
    """Equal for two commands of the same stages with the same settings and first parent."""
    settings = [comparable(settings_of(recipe, stage, start, digests)) for stage in stages]
    plan = recipe.layers.model_dump(mode="json")
    return hashlib.sha256(json.dumps([settings, plan], sort_keys=True).encode()).hexdigest()


ATTEMPT = "attempt.json"


class Attempt(BaseModel):
    """The contents of `attempt.json`. `replaces` is `created` of the product there was, if any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    replaces: str | None


@dataclass(frozen=True)
class Request:
    """What is asked of one stage.

    `overwrite` repeats a finished stage and goes on with a repetition that was interrupted;
    `restart` begins at step 1 in any case; `force` goes on although settings differ. `repeated` is
    `created` of the product if this very command has repeated the stage before it was interrupted.
    """

    name: str
    parent: Manifest
    stage: Stage
    settings: Mapping[str, Any]
    overwrite: bool = False
    restart: bool = False
    force: bool = False
    repeated: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is done about a stage.

    `done` is its product where there is nothing to train, and `fresh` says that this product was
    written by the interrupted command, whose metrics have yet to be moved. Otherwise training goes
    on after `progress`. `overwrite` allows that there is a product; `replaces` is its `created`.
    """

    done: Manifest | None = None
    fresh: bool = False
    progress: Progress = field(default_factory=Progress)
    overwrite: bool = False
    replaces: str | None = None
    remarks: tuple[str, ...] = ()


def make_plan(run: Run, states: StateFolder, request: Request) -> Plan:
    """Decide what is to be done; changes nothing. Called by process 0 alone.

    Raises `RunError` for a finished or begun stage of other settings or another parent, and for a
    finished one of which a repetition was interrupted, unless the request allows it.
    """
    product = run.products().get(request.name)
    steps = states.steps()
    newest = steps[-1] if steps else None
    remarks = [
        f"ignored: {states.folder / name} was not written to its end"
        for name in states.half_written()
    ]
    if request.restart:
        return _first_step(product, remarks)
    fresh = product is not None and _is_fresh(states, product, newest)
    if product is not None and (
        fresh or not request.overwrite or product.created == request.repeated
    ):
        if not fresh and newest is not None and not request.overwrite:
            raise RunError(
                f"{request.name} is finished, and a repetition of it with --overwrite was "
                f"interrupted after step {newest} of {request.stage.steps}",
                f"go on with --overwrite, or keep the finished one and remove {states.folder}",
            )
        problem = _problem_of(product, request)
        if problem is None:
            remark = f"{request.name} is finished already; --overwrite repeats it"
            return Plan(product, fresh, remarks=(*remarks, remark))
        if not request.overwrite:
            raise problem
        return _first_step(product, remarks)
    if newest is None:
        return _first_step(product, remarks)
    return _next_step(states, product, request, newest, remarks)


def begin(states: StateFolder, plan: Plan) -> None:
    """Make the folder ready for training from step 1; one to be resumed is left as it is.

    An old product stays where it is until the new one is complete.
    """
    if plan.progress.step:
        return
    states.clear()
    text = Attempt(replaces=plan.replaces).model_dump_json(indent=2) + "\n"
    # A folder without this file is taken for one of an older version.
    with atomic_folder(states.folder) as partial:
        (partial / ATTEMPT).write_text(text, encoding="utf-8")


def _first_step(product: Manifest | None, remarks: list[str]) -> Plan:
    replaces = None if product is None else product.created
    return Plan(overwrite=product is not None, replaces=replaces, remarks=tuple(remarks))


def _next_step(
    states: StateFolder,
    product: Manifest | None,
    request: Request,
    newest: int,
    remarks: list[str],
) -> Plan:
    record = states.record(states.path(newest).name)
    changed = differences(record.settings, request.settings)
    if changed and not request.force:
        if request.overwrite:
            remarks.append(
                f"beginning at step 1: the state after step {newest} was made with other settings: "
                + "; ".join(changed)
            )
            return _first_step(product, remarks)
        raise RunError(
            "the training state to resume was made with other settings: " + "; ".join(changed),
            "go on with these settings by --force, begin at step 1 with --overwrite, or take the "
            "old settings",
        )
    progress = record.progress
    if not same_held_out(record.settings, request.settings):
        # Losses on other samples do not compare.
        progress.best_step = progress.best_loss = None
    best = progress.best_step
    if best is not None and not (states.folder / states.best(best) / STATE).is_file():
        raise RunError(
            f"{states.folder} lacks {states.best(best)}, the student of the lowest held-out loss",
            "begin at step 1 with --restart",
        )
    attempt = _read(states)
    replaces = product is not None or (attempt is not None and attempt.replaces is not None)
    remarks.append(f"resuming after step {newest}")
    return Plan(progress=progress, overwrite=replaces, remarks=tuple(remarks))


def _is_fresh(states: StateFolder, product: Manifest, newest: int | None) -> bool:
    """Whether the product was written by the training whose states are still there."""
    attempt = _read(states)
    if attempt is not None:
        return attempt.replaces != product.created
    if newest is None:
        # What is left of a training of an older version: its states went before its metrics.
        return states.folder.is_dir()
    # States of an older version, which cleared them before it repeated a stage.
    record = states.record(states.path(newest).name)
    return newest == product.metrics.get("step") and record.written <= product.created


def _problem_of(product: Manifest, request: Request) -> RunError | None:
    """Why a finished product is not what was asked for, or None if it is."""
    origin = next((p.content_hash for p in product.parents if p.role == "student"), None)
    parent, stage = request.parent, request.stage
    if origin != parent.content_hash or product.stages[-1:] != (stage.name,):
        return RunError(
            f"there is a product {product.name!r} already, made from another parent than "
            f"{parent.name!r} as it is now",
            "replace it with --overwrite, or choose another --run",
        )
    settings = product_settings(product, stage, parent)
    changed = [] if settings is None else differences(settings, request.settings)
    if not changed:
        return None
    return RunError(
        f"{product.name} is finished, and was made with other settings: " + "; ".join(changed),
        "repeat it with --overwrite, take the old settings, or name later stages with --stage",
    )


def _read(states: StateFolder) -> Attempt | None:
    file = states.folder / ATTEMPT
    return parse_model(file, Attempt) if file.is_file() else None
