"""Which stages an unfinished `distill --overwrite` has repeated already.

Without it, the same command after an interruption in its second stage would repeat the first one
again, and a job that is requeued at every time limit would never end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.distill.resume import Digests, comparable, settings_of
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
