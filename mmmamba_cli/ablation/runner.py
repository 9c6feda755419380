"""The runner of a plan: which cells and trunks run, in which order, until when."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mmmamba_cli.ablation.cell_record import (
    CellRecord,
    Timing,
    finished_records,
    read_records,
    write_record,
)
from mmmamba_cli.ablation.cells import Cell, Trunk
from mmmamba_cli.ablation.estimates import Estimator
from mmmamba_cli.ablation.plan import Plan
from mmmamba_cli.ablation.plan_progress import PlanProgress, Unit, units_to_run
from mmmamba_cli.ablation.run_folders import prune_run
from mmmamba_cli.runs.manifest import utc_timestamp

# Time kept free before the limit: a step, a training state and a product are written in it.
STOP_MARGIN_SECONDS = 20.0
STOP_MARGIN_SHARE = 0.1


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


@dataclass(frozen=True)
class UnitEnd:
    """How a cell or trunk ended; `message` is that of a failure."""

    unit: Unit
    status: str  # finished, stopped or failed
    message: str = ""


class Pool(Protocol):
    """Runs units, at most `jobs` at a time."""

    @property
    def running(self) -> Sequence[Unit]: ...

    def start(self, unit: Unit, parent: Trunk | None, deadline: float | None) -> None:
        """Start a unit; `deadline` is a time of `time.monotonic`."""
        ...

    def wait(self) -> list[UnitEnd]:
        """Wait until at least one unit has ended."""
        ...


@dataclass(frozen=True)
class RunnerEvents:
    """Functions that the runner calls; `update` gets cells done, cells in all and minutes left."""

    say: Callable[[str], None]
    update: Callable[[int, int, float | None], None]
    should_stop: Callable[[], bool]


@dataclass
class Outcome:
    """What a call did: cells by name, and messages of those that failed."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    # Left because their estimate does not fit into the time that is left.
    too_long: list[str] = field(default_factory=list)
    stopped: bool = False


def run_plan(
    plan: Plan,
    progress: PlanProgress,
    pool: Pool,
    *,
    out: Path,
    work: Path,
    keep: Sequence[str],
    jobs: int,
    limit: TimeLimit | None,
    events: RunnerEvents,
) -> Outcome:
    """Run the pending cells, parents first, until the time is over or the caller stops.

    A cell is not started if its estimate exceeds the time that is left, unless it exceeds the
    whole time: such a cell is begun and goes on in the next call. The caller holds the locks.
    """
    deadline = None if limit is None else limit.deadline
    estimator = Estimator(plan.estimates, progress.records.values())
    queue = _Queue(progress, estimator, work)
    outcome = Outcome()
    total = len(progress.pending)
    while True:
        while len(pool.running) < jobs and not events.should_stop():
            chosen = queue.take(limit)
            if chosen is None:
                break
            pool.start(*chosen, deadline)
        if not pool.running:
            break
        events.update(total - queue.cells_left(), total, queue.seconds_left(jobs))
        for end in pool.wait():
            _note(end, queue, outcome, plan, progress, out, events)
            if end.status == "finished" and isinstance(end.unit, Cell):
                records, _ = read_records(out, [end.unit])
                estimator.add(records[end.unit.name])
    events.update(total - queue.cells_left(), total, queue.seconds_left(jobs))
    known = {*outcome.finished, *outcome.failed}
    outcome.left = [cell.name for cell in progress.pending if cell.name not in known]
    outcome.too_long = [name for name in outcome.left if name in queue.too_long]
    outcome.stopped = events.should_stop()
    remove_unneeded(progress, outcome, work, keep)
    return outcome


def _note(
    end: UnitEnd,
    queue: _Queue,
    outcome: Outcome,
    plan: Plan,
    progress: PlanProgress,
    out: Path,
    events: RunnerEvents,
) -> None:
    """Add the end of a unit to the outcome; the cells of a failed trunk fail with it.

    A cell that could not be evaluated on a suite gained by the plan keeps its result.
    """
    unit = end.unit
    if end.status == "stopped":
        queue.close()
        return
    if end.status == "finished":
        queue.finish(unit)
        if isinstance(unit, Cell):
            outcome.finished.append(unit.name)
        return
    lost = queue.fail(unit)
    for cell in lost:
        message = end.message
        if isinstance(unit, Trunk):
            message = f"the stages {', '.join(unit.stages)} that it shares failed: {message}"
        events.say(f"{cell.name} failed: {message}")
        outcome.failed[cell.name] = message
        if cell.name in finished_records(progress.records):
            continue
        record = CellRecord(
            plan=plan.name,
            cell=cell.name,
            arm=cell.arm,
            seed=cell.seed,
            digest=cell.digest_with(()),
            status="failed",
            error=message,
            timing=Timing(date=utc_timestamp()),
        )
        write_record(out, cell, record)


class _Queue:
    """Units that wait, in order, and what they wait for."""

    def __init__(self, progress: PlanProgress, estimator: Estimator, work: Path):
        self._waiting = {unit.folder: (unit, parent) for unit, parent in units_to_run(progress)}
        self._unfinished = {unit.folder: unit for unit, _ in self._waiting.values()}
        self._trunks = progress.pending_trunks
        self._estimator = estimator
        self._work = work
        self._closed = False
        self.too_long: set[str] = set()

    def take(self, limit: TimeLimit | None) -> tuple[Unit, Trunk | None] | None:
        """The next unit whose parent is done and which fits into the time; None if none does."""
        if self._closed:
            return None
        left = math.inf if limit is None else limit.deadline - time.monotonic()
        whole = math.inf if limit is None else limit.seconds
        if left <= 0:
            return None
        for unit, parent in list(self._waiting.values()):
            if parent is not None and parent.folder in self._unfinished:
                continue
            seconds = self._seconds(unit, parent)
            if seconds is None or seconds <= left or seconds > whole:
                del self._waiting[unit.folder]
                return unit, parent
            self.too_long |= {cell.name for cell in self._cells_of(unit)}
        return None

    def _seconds(self, unit: Unit, parent: Trunk | None) -> float | None:
        return self._estimator.seconds(unit, self._work, parent.stages if parent else ())

    def _cells_of(self, unit: Unit) -> list[Cell]:
        """The unfinished cells that need a unit."""
        cells = [one for one in self._unfinished.values() if isinstance(one, Cell)]
        if isinstance(unit, Cell):
            return [unit]
        return [cell for cell in cells if unit in self._trunks.get(cell.name, ())]

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
            if isinstance(unit, Trunk):
                path = self._trunks[cell.name]
                gone |= {trunk.folder for trunk in path[path.index(unit) :]}
        for folder in gone:
            self._waiting.pop(folder, None)
            self._unfinished.pop(folder, None)
        return lost

    def cells_left(self) -> int:
        return sum(isinstance(unit, Cell) for unit in self._unfinished.values())

    def seconds_left(self, jobs: int) -> float | None:
        """Estimated seconds of all unfinished units; None if one is unknown."""
        total = 0.0
        for unit in self._unfinished.values():
            path = self._trunks.get(unit.name, ()) if isinstance(unit, Cell) else ()
            parent = path[-1] if path else getattr(unit, "parent", None)
            seconds = self._seconds(unit, parent)
            if seconds is None:
                return None
            total += seconds
        return total / jobs


def remove_unneeded(
    progress: PlanProgress, outcome: Outcome | None, work: Path, keep: Sequence[str]
) -> None:
    """Remove the runs of trunks that no cell without a result needs, and prune finished cells.

    Safe to repeat: a killed runner may have left them.
    """
    done = set(finished_records(progress.records)) | set(outcome.finished if outcome else ())
    needed = {
        trunk.folder for name, path in progress.trunks.items() for trunk in path if name not in done
    }
    for path in progress.trunks.values():
        for trunk in path:
            folder = work / trunk.folder
            if trunk.folder not in needed and folder.is_dir():
                shutil.rmtree(folder)
    # The model of a cell that lacks suites is needed.
    waiting = {cell.name for cell in progress.pending}
    for name, run in progress.folders.items():
        record = progress.records.get(name)
        if record is not None and record.status == "finished" and name not in waiting:
            evaluated = record.model.product if record.model and record.seed is not None else None
            prune_run(work / run, keep, evaluated)
