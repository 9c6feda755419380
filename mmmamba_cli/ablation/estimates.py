"""Estimated seconds of cells, from those that have been measured, else from the plan's hints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mmmamba_cli.ablation.cell_record import CellRecord
from mmmamba_cli.ablation.cells import Cell, SharedStages
from mmmamba_cli.ablation.plan import Hints, SuiteUse
from mmmamba_cli.ablation.run_folders import RunState, read_run_state

# Everything in a cell but steps and suites.
OTHER = "other"


@dataclass(frozen=True)
class Estimate:
    """Seconds until a unit is done.

    `resumable` are those of steps and answers, which are saved on the way; `other` are those of
    seeding, loading, a selection of layers and commands, which begin again.
    """

    resumable: float
    other: float

    @property
    def seconds(self) -> float:
        return self.resumable + self.other


class _Measured:
    """Seconds by arm and name, each with the number of jobs that ran at the same time."""

    def __init__(self) -> None:
        self._values: dict[tuple[str | None, str], list[tuple[int, float]]] = defaultdict(list)

    def add(self, arm: str | None, name: str, jobs: int, seconds: float) -> None:
        for key in ((arm, name), (None, name)):
            self._values[key].append((jobs, seconds))

    def value(self, arm: str | None, name: str, jobs: int) -> float | None:
        """The median of the same arm if it was measured, else of all arms.

        Values of the same number of jobs count alone if there are any: jobs share a device.
        """
        found = self._values.get((arm, name)) or self._values.get((None, name))
        if not found:
            return None
        alike = [seconds for number, seconds in found if number == jobs]
        return median(alike or [seconds for _, seconds in found])

    def clear(self) -> None:
        self._values.clear()


class Estimator:
    """Seconds of units: measured ones of the device that the newest record ran on, else hints.

    A step is estimated from the steps that the run itself has done, then from finished cells of
    the same arm, of other arms, and last from unfinished runs of the plan.
    """

    def __init__(
        self,
        hints: Hints,
        records: Iterable[CellRecord] = (),
        *,
        work: Path,
        jobs: int = 1,
        units: Iterable[Cell | SharedStages] = (),
    ):
        self._hints, self._work, self._jobs = hints, work, jobs
        self._device: str | None = None
        self._steps, self._suites, self._other = _Measured(), _Measured(), _Measured()
        # The runs as they stood before they were started, or when they ended.
        self._runs: dict[str, RunState] = {}
        # Labels of the suites that finished cells have answers to.
        self._answered: dict[str, set[str]] = {}
        # Questions asked of each suite.
        self._asked: dict[str, int] = {}
        for record in sorted(records, key=lambda one: one.timing.date):
            self.add(record)
        for unit in units:
            self.read_run(unit)

    def add(self, record: CellRecord) -> None:
        """Add the measurements of a finished cell."""
        if record.status != "finished":
            return
        self._answered[record.cell] = {suite.label for suite in record.suites}
        self._asked |= {suite.label: suite.asked for suite in record.suites}
        if record.device != self._device:
            for measured in (self._steps, self._suites, self._other):
                measured.clear()
            self._device = record.device
        timing = record.timing
        for stage in record.stages:
            seconds = timing.stages.get(stage.name)
            if seconds is not None:
                each = seconds / max(1, stage.steps)
                self._steps.add(record.arm, stage.name, timing.jobs, each)
        if record.seed is not None:
            self._other.add(record.arm, OTHER, timing.jobs, timing.other)
        for label, seconds in timing.suites.items():
            self._suites.add(record.arm, label, timing.jobs, seconds)

    def read_run(self, unit: Cell | SharedStages) -> None:
        """Read how far the run of a unit has come, which must not be running."""
        self._runs[unit.folder] = read_run_state(self._work / unit.folder)

    def estimate(self, unit: Cell | SharedStages, shared: tuple[str, ...] = ()) -> Estimate | None:
        """The seconds until a cell or shared stages are done, from where the run is, or None.

        `shared` are the names of the stages that it continues.
        """
        answered = self._answered.get(unit.name, set())
        arm = unit.arm if isinstance(unit, Cell) else None
        other = self._other.value(arm, OTHER, self._jobs)
        parts: list[float | None] = []
        if unit.recipe is not None and not answered:
            parts += self._training(arm, unit, shared)
        if isinstance(unit, Cell):
            parts += [self._suite(unit, use) for use in unit.suites if use.title not in answered]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return Estimate(sum(known), self._hints.cell if other is None else other)

    def _training(
        self, arm: str | None, unit: Cell | SharedStages, shared: tuple[str, ...]
    ) -> list[float | None]:
        """Seconds of each stage that is left, without the steps that are saved."""
        assert unit.recipe is not None
        state = self._state(unit)
        done = max(state.done, shared, key=len)
        found: list[float | None] = []
        for stage in unit.recipe.stages:
            if stage.name not in unit.stages or stage.name in done:
                continue
            each = self._step(arm, stage.name, state)
            left = max(0, stage.steps - state.saved_steps.get(stage.name, 0))
            found.append(None if each is None else left * each)
        return found

    def _step(self, arm: str | None, stage: str, state: RunState) -> float | None:
        runs = [run.step_seconds for run in self._runs.values()]
        others = [rates[stage] for rates in runs if stage in rates]
        return _first(
            state.step_seconds.get(stage),
            self._steps.value(arm, stage, self._jobs),
            median(others) if others else None,
            self._hints.step.get(stage),
        )

    def _state(self, unit: Cell | SharedStages) -> RunState:
        if unit.folder not in self._runs:
            self.read_run(unit)
        return self._runs[unit.folder]

    def _suite(self, cell: Cell, use: SuiteUse) -> float | None:
        """Seconds of a suite, without those of the answers that are kept."""
        seconds = _first(
            self._suites.value(cell.arm, use.title, self._jobs), self._hints.suite.get(use.title)
        )
        asked = self._asked.get(use.title)
        if seconds is None or not asked:
            return seconds
        kept = self._state(cell).answers.get(use.title, 0)
        return seconds * max(0.0, 1 - kept / asked)


def _first(*values: float | None) -> float | None:
    """The first value that is known."""
    return next((value for value in values if value is not None), None)
