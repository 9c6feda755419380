"""The units of a plan that wait: which one is next, given the time left and the memory."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mmmamba_cli.ablation.cells import Cell, SharedStages
from mmmamba_cli.ablation.estimates import Estimate, Estimator
from mmmamba_cli.ablation.plan_progress import PlanProgress, Unit, units_to_run

# Time kept free before the limit: a step, a training state and a product are written in it.
STOP_MARGIN_SECONDS = 20.0
STOP_MARGIN_SHARE = 0.1
# A unit that cannot end in the time left is begun if steps and answers of so many seconds, or of
# this share of the unit, or of this share of the limit, can be done and saved.
MIN_PROGRESS_SECONDS = 120.0
MIN_PROGRESS_SHARE = 0.1
MIN_LIMIT_SHARE = 0.5


@dataclass(frozen=True)
class TimeLimit:
    """A limit of `seconds` that began at `started`, a time of `time.monotonic`."""

    seconds: float
    started: float

    @property
    def deadline(self) -> float:
        """When running cells are asked to save and stop."""
        margin = min(STOP_MARGIN_SECONDS, STOP_MARGIN_SHARE * self.seconds)
        return self.started + self.seconds - margin


def is_worth_beginning(estimate: Estimate | None, left: float, whole: float = math.inf) -> bool:
    """Whether enough of a unit can be done and saved in `left` of `whole` seconds to begin it."""
    if estimate is None or estimate.seconds <= left:
        return True
    shares = MIN_PROGRESS_SHARE * estimate.resumable, MIN_LIMIT_SHARE * whole
    needed = min(MIN_PROGRESS_SECONDS, *shares)
    return left - estimate.other >= needed


@dataclass(frozen=True)
class Waiting:
    """A unit with the shared stages that it starts from.

    `most` is the number of units that may run together with it, itself included; None for no limit.
    """

    unit: Unit
    parent: SharedStages | None
    most: int | None = None

    @property
    def shared(self) -> tuple[str, ...]:
        return self.parent.stages if self.parent else ()


class UnitQueue:
    """Units that wait, in order, and what they wait for."""

    def __init__(self, progress: PlanProgress, estimator: Estimator):
        units = [Waiting(unit, parent) for unit, parent in units_to_run(progress)]
        self._waiting = {one.unit.folder: one for one in units}
        self._unfinished = dict(self._waiting)
        self._shared_stages = progress.pending_shared_stages
        self._estimator = estimator
        self._closed = False
        self._has_begun = False
        # Cells that were not begun because too little time was left.
        self.too_long: set[str] = set()

    def take(self, limit: TimeLimit | None, running: Sequence[Unit]) -> Waiting | None:
        """The next unit to start beside those that run; None if none can be.

        A unit must have its parent, and fit into the memory that the running ones leave. The first
        one that ends in the time left is taken, else the first that is worth to be begun. A call
        that has begun nothing takes the first one nevertheless, because the next call would not
        have more time.
        """
        left = math.inf if limit is None else limit.deadline - time.monotonic()
        whole = math.inf if limit is None else limit.seconds
        if self._closed or left <= 0:
            return None
        for ready in self._ready(running):
            chosen = self._choose(ready, left, whole)
            if chosen is not None:
                del self._waiting[chosen.unit.folder]
                self._has_begun = True
                return chosen
        return None

    def _choose(self, ready: Sequence[Waiting], left: float, whole: float) -> Waiting | None:
        """The unit to begin in the time left; cells of the others are `too_long` if they cannot."""
        known = [(one, self._estimate(one)) for one in ready]
        fitting = [one for one, found in known if found is None or found.seconds <= left]
        partial = [one for one, found in known if is_worth_beginning(found, left, whole)]
        chosen = next(iter(fitting or partial or ([] if self._has_begun else ready)), None)
        for one in ready:
            names = {cell.name for cell in self._cells_of(one.unit)}
            if one is chosen or one in partial:
                self.too_long -= names
            else:
                self.too_long |= names
        return chosen

    def _ready(self, running: Sequence[Unit]) -> tuple[list[Waiting], list[Waiting]]:
        """The units whose parent is done and that may run beside the running ones.

        The second list has those that have run out of memory, which let the others go first.
        """
        limits = [self._unfinished[unit.folder].most for unit in running]
        number = len(running) + 1
        if any(most is not None and number > most for most in limits):
            return [], []
        ready = [
            one
            for one in self._waiting.values()
            if one.parent is None or one.parent.folder not in self._unfinished
        ]
        fewer = [one for one in ready if one.most is not None and number <= one.most]
        return [one for one in ready if one.most is None], fewer

    def put_back(self, unit: Unit, most: int) -> None:
        """Let a unit that ran out of memory wait until fewer than `most` others run."""
        again = Waiting(unit, self._unfinished[unit.folder].parent, most)
        self._waiting[unit.folder] = self._unfinished[unit.folder] = again

    def most_together(self, unit: Unit) -> int | None:
        """The number of units that may run together with a unit, itself included."""
        return self._unfinished[unit.folder].most

    def out_of_memory(self) -> set[str]:
        """The unfinished cells that wait because they, or stages they share, ran out of memory."""
        waiting = [one for one in self._waiting.values() if one.most is not None]
        return {cell.name for one in waiting for cell in self._cells_of(one.unit)}

    def _estimate(self, one: Waiting) -> Estimate | None:
        return self._estimator.estimate(one.unit, one.shared)

    def _cells_of(self, unit: Unit) -> list[Cell]:
        """The unfinished cells that need a unit."""
        if isinstance(unit, Cell):
            return [unit]
        cells = [one.unit for one in self._unfinished.values() if isinstance(one.unit, Cell)]
        return [cell for cell in cells if unit in self._shared_stages.get(cell.name, ())]

    def close(self) -> None:
        """Start nothing more."""
        self._closed = True

    def finish(self, unit: Unit) -> None:
        self._unfinished.pop(unit.folder, None)

    def fail(self, unit: Unit) -> list[Cell]:
        """Give up a unit and what depends on it; return the cells."""
        lost = self._cells_of(unit)
        gone = {unit.folder, *(cell.folder for cell in lost)}
        for cell in lost:
            if isinstance(unit, SharedStages):
                path = self._shared_stages[cell.name]
                gone |= {shared.folder for shared in path[path.index(unit) :]}
        for folder in gone:
            self._waiting.pop(folder, None)
            self._unfinished.pop(folder, None)
        return lost

    def cells_left(self) -> int:
        return sum(isinstance(one.unit, Cell) for one in self._unfinished.values())

    def units_left(self) -> int:
        """Units that run or wait."""
        return len(self._unfinished)

    def seconds_left(self, jobs: int) -> float | None:
        """Estimated seconds of all unfinished units; None if one is unknown."""
        found = [self._estimate(one) for one in self._unfinished.values()]
        known = [estimate.seconds for estimate in found if estimate is not None]
        if len(known) < len(found):
            return None
        return max(sum(known) / jobs, max(known, default=0.0))
