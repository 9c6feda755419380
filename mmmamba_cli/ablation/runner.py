"""The runner of a plan: which cells and shared stages run, in which order, until when."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mmmamba_cli.ablation.cell_record import (
    CellRecord,
    Timing,
    finished_records,
    first_sentence,
    read_records,
    record_file,
    write_record,
)
from mmmamba_cli.ablation.cells import Cell, SharedStages
from mmmamba_cli.ablation.estimates import Estimator
from mmmamba_cli.ablation.plan import Plan
from mmmamba_cli.ablation.plan_progress import PlanProgress, Unit, units_to_run
from mmmamba_cli.ablation.run_folders import prune_run
from mmmamba_cli.ablation.unit_queue import TimeLimit, UnitQueue
from mmmamba_cli.runs.manifest import utc_timestamp


@dataclass(frozen=True)
class UnitEnd:
    """How a cell or shared stages ended.

    Attributes:
        unit: the cell or shared stages.
        status: `finished`, `stopped`, `failed` or `out of memory`.
        message: of a failure.
        beside: the most other units that have run on its device at the same time.
    """

    unit: Unit
    status: str
    message: str = ""
    beside: int = 0


class Pool(Protocol):
    """Runs units, at most `jobs` at a time."""

    @property
    def running(self) -> Sequence[Unit]: ...

    @property
    def devices(self) -> int:
        """Devices that the units are spread over evenly."""
        ...

    def start(
        self, unit: Unit, parent: SharedStages | None, deadline: float | None, sharing: int
    ) -> None:
        """Start a unit on the device with the fewest.

        `deadline` is a time of `time.monotonic`; `sharing` is the number of units that may share
        the memory of the device, this one included.
        """
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
    # Left and not begun, because too little time was left.
    too_long: list[str] = field(default_factory=list)
    # Left because they ran out of memory beside others and were not tried again yet.
    out_of_memory: list[str] = field(default_factory=list)
    # Shared stages that were trained.
    trained: list[str] = field(default_factory=list)
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

    Units that end in the time left come first; another one is begun if a part of it can be done
    and saved (`is_worth_beginning`), and goes on in the next call. A unit that runs out of memory
    beside others runs again with fewer of them. The caller holds the locks.
    """
    deadline = None if limit is None else limit.deadline
    units = [unit for unit, _ in units_to_run(progress)]
    records = progress.records.values()
    estimator = Estimator(plan.estimates, records, work=work, jobs=jobs, units=units)
    queue = UnitQueue(progress, estimator)
    outcome = Outcome()
    total = len(progress.pending)
    while True:
        while len(pool.running) < jobs and not events.should_stop():
            chosen = queue.take(limit, pool.running)
            if chosen is None:
                break
            most = min(jobs, queue.units_left(), chosen.most or jobs)
            pool.start(chosen.unit, chosen.parent, deadline, math.ceil(most / pool.devices))
        if not pool.running:
            break
        events.update(total - queue.cells_left(), total, queue.seconds_left(jobs))
        for end in pool.wait():
            estimator.read_run(end.unit)
            if end.status == "out of memory" and end.beside:
                _run_again(end, queue, pool, events)
                continue
            _note(end, queue, outcome, plan, progress, out, events)
            if end.status == "finished" and isinstance(end.unit, Cell):
                found, _ = read_records(out, [end.unit])
                estimator.add(found[end.unit.name])
    events.update(total - queue.cells_left(), total, queue.seconds_left(jobs))
    known = {*outcome.finished, *outcome.failed}
    outcome.left = [cell.name for cell in progress.pending if cell.name not in known]
    outcome.too_long = [name for name in outcome.left if name in queue.too_long]
    put_back = queue.out_of_memory()
    outcome.out_of_memory = [name for name in outcome.left if name in put_back]
    outcome.stopped = events.should_stop()
    remove_unneeded(progress, outcome, work, keep)
    return outcome


def _run_again(end: UnitEnd, queue: UnitQueue, pool: Pool, events: RunnerEvents) -> None:
    """Let a unit that ran out of memory beside others wait until half as many share its device."""
    sharing = max(1, (end.beside + 1) // 2)
    queue.put_back(end.unit, sharing * pool.devices)
    others = f"{end.beside} others" if end.beside > 1 else "another"
    how = f"beside at most {sharing - 1}" if sharing > 1 else "alone on its device"
    events.say(
        f"{end.unit.name} ran out of memory beside {others} and runs again {how}: "
        f"{first_sentence(end.message)}"
    )


def _note(
    end: UnitEnd,
    queue: UnitQueue,
    outcome: Outcome,
    plan: Plan,
    progress: PlanProgress,
    out: Path,
    events: RunnerEvents,
) -> None:
    """Add the end of a unit to the outcome; the cells of failed shared stages fail too.

    A cell that could not be evaluated on a suite gained by the plan keeps its result.
    """
    unit = end.unit
    if end.status == "stopped":
        queue.close()
        return
    if end.status == "finished":
        queue.finish(unit)
        done = outcome.finished if isinstance(unit, Cell) else outcome.trained
        done.append(unit.name)
        return
    message = end.message
    if queue.most_together(unit) is not None:
        message = f"also alone on its device, {message}"
    if isinstance(unit, SharedStages):
        message = f"the stages {', '.join(unit.stages)} that it shares failed: {message}"
    for cell in queue.fail(unit):
        outcome.failed[cell.name] = message
        if cell.name in finished_records(progress.records):
            events.say(f"{cell.name} failed: {message}")
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
        file = record_file(out, cell)
        events.say(f"{cell.name} failed: {first_sentence(message)} (whole message: {file})")


def remove_unneeded(
    progress: PlanProgress, outcome: Outcome | None, work: Path, keep: Sequence[str]
) -> None:
    """Remove runs of shared stages that no cell without a result needs, and prune finished cells.

    Safe to repeat: a killed runner may have left them.
    """
    done = set(finished_records(progress.records)) | set(outcome.finished if outcome else ())
    needed = {
        shared.folder
        for name, path in progress.shared_stages.items()
        for shared in path
        if name not in done
    }
    for path in progress.shared_stages.values():
        for shared in path:
            folder = work / shared.folder
            if shared.folder not in needed and folder.is_dir():
                shutil.rmtree(folder)
    # The model of a cell that lacks suites is needed.
    waiting = {cell.name for cell in progress.pending}
    for name, run in progress.folders.items():
        record = progress.records.get(name)
        if record is not None and record.status == "finished" and name not in waiting:
            evaluated = record.model.product if record.model and record.seed is not None else None
            prune_run(work / run, keep, evaluated)
