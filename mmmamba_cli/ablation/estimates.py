"""Estimated seconds of cells, from those that have been measured, else from the plan's hints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from mmmamba_cli.ablation.cell_record import CellRecord
from mmmamba_cli.ablation.cells import Cell, Trunk
from mmmamba_cli.ablation.plan import Hints
from mmmamba_cli.ablation.run_folders import steps_done
from mmmamba_cli.recipe import Recipe

# Everything in a cell but steps and suites.
OTHER = "other"


class Estimator:
    """Medians of measured seconds: those of the same arm if there are any, else of all arms.

    Only records of the device that the newest one ran on count.
    """

    def __init__(self, hints: Hints, records: Iterable[CellRecord] = ()):
        self._hints = hints
        self._device: str | None = None
        self._steps: dict[tuple[str | None, str], list[float]] = defaultdict(list)
        self._suites: dict[tuple[str | None, str], list[float]] = defaultdict(list)
        self._other: dict[tuple[str | None, str], list[float]] = defaultdict(list)
        # Labels of the suites that finished cells have answers to.
        self._answered: dict[str, set[str]] = {}
        for record in sorted(records, key=lambda one: one.timing.date):
            self.add(record)

    def add(self, record: CellRecord) -> None:
        """Add the measurements of a finished cell."""
        if record.status != "finished":
            return
        self._answered[record.cell] = {suite.label for suite in record.suites}
        if record.device != self._device:
            self._steps.clear()
            self._suites.clear()
            self._other.clear()
            self._device = record.device
        for stage in record.stages:
            seconds = record.timing.stages.get(stage.name)
            if seconds is not None:
                for arm in (record.arm, None):
                    self._steps[arm, stage.name].append(seconds / max(1, stage.steps))
        if record.seed is not None:
            for arm in (record.arm, None):
                self._other[arm, OTHER].append(record.timing.other)
        for label, seconds in record.timing.suites.items():
            for arm in (record.arm, None):
                self._suites[arm, label].append(seconds)

    def seconds(self, unit: Cell | Trunk, work: Path, shared: tuple[str, ...] = ()) -> float | None:
        """Seconds until a cell or a trunk is done, from where its run is; None if unknown.

        `shared` are the stages of the trunk that it continues.
        """
        answered = self._answered.get(unit.name, set())
        done, steps = steps_done(work / unit.folder)
        done = max(done, shared, key=len)
        arm = unit.arm if isinstance(unit, Cell) else None
        parts: list[float | None] = [
            self._value(self._other, arm, OTHER, {OTHER: self._hints.cell})
        ]
        if unit.recipe is not None and not answered:
            parts.append(self._training(arm, unit.recipe, unit.stages, done, steps))
        if isinstance(unit, Cell):
            parts += [
                self._value(self._suites, arm, use.title, self._hints.suite)
                for use in unit.suites
                if use.title not in answered
            ]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _training(
        self,
        arm: str | None,
        recipe: Recipe,
        stages: tuple[str, ...],
        done: tuple[str, ...],
        n: int,
    ) -> float | None:
        total = 0.0
        left = [s for s in recipe.stages if s.name in stages and s.name not in done]
        for place, stage in enumerate(left):
            each = self._value(self._steps, arm, stage.name, self._hints.step)
            if each is None:
                return None
            total += each * max(0, stage.steps - (n if place == 0 else 0))
        return total

    def _value(
        self,
        measured: dict[tuple[str | None, str], list[float]],
        arm: str | None,
        name: str,
        hints: dict[str, float],
    ) -> float | None:
        for key in ((arm, name), (None, name)):
            if key in measured:
                return median(measured[key])
        return hints.get(name)
