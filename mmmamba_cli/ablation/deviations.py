"""Deviations from the base arm beyond the spread of its seeds, with speed and memory.

A difference within the spread of seeds is none: repeating the base with another seed moves its
scores as far. Legend: N seeds of the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, stdev
from typing import Any, Protocol

from mmmamba_cli.ablation.cell_record import CellRecord
from mmmamba_cli.ablation.plan import Plan, Table
from mmmamba_cli.ablation.text_table import TextTable

# A deviation is a difference beyond this multiple of the standard deviation over the base's seeds.
SPREAD_FACTOR = 2.0
HELD_OUT = "loss"


class CellScores(Protocol):
    """Scores of cells on one suite."""

    @property
    def values(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Deviations:
    """Comparisons of cells with the base's cell of the same seed.

    `beyond` of them differ by more than `SPREAD_FACTOR` times the spread; `largest` is the largest
    difference as a multiple of it, None without comparisons or with a spread of 0.
    """

    compared: int = 0
    beyond: int = 0
    largest: float | None = None

    def __add__(self, other: Deviations) -> Deviations:
        known = [one for one in (self.largest, other.largest) if one is not None]
        return Deviations(
            self.compared + other.compared,
            self.beyond + other.beyond,
            max(known, default=None),
        )


def count_deviations(mine: Mapping[int, float], base: Mapping[int, float]) -> Deviations:
    """Compare values by seed. Nothing is compared with a base of fewer than two seeds."""
    if len(base) < 2:
        return Deviations()
    spread = stdev(base.values())
    differences = [abs(value - base[seed]) for seed, value in mine.items() if seed in base]
    beyond = sum(difference > SPREAD_FACTOR * spread for difference in differences)
    largest = max(differences) / spread if differences and spread > 0 else None
    return Deviations(len(differences), beyond, largest)


def deviation_table(
    plan: Plan,
    table: Table,
    scores: Sequence[CellScores],
    records: Mapping[str, CellRecord],
) -> TextTable | None:
    """A row for each arm with a finished cell; None if the base has fewer than two seeds.

    Scores are counted per suite and seed, held-out losses per saved step of the last stage and
    seed; speed and memory are those of the last stage.
    """
    base = table.base or plan.base
    if len(_cells(records, base)) < 2:
        return None
    titles = {arm.name: arm.title or arm.name for arm in plan.arms}
    speed = _median_of(records, base, "tokens_per_second")
    rows: list[tuple[object, ...]] = []
    values: list[dict[str, Any]] = []
    for arm in table.arms:
        if not _cells(records, arm):
            continue
        suites = _score_deviations(records, arm, base, scores)
        steps = _step_deviations(records, arm, base)
        own = _median_of(records, arm, "tokens_per_second")
        memory = _median_of(records, arm, "memory_gib")
        is_base = arm == base
        rows.append(
            (
                titles.get(arm, arm),
                *((None, None) if is_base else (_counted(suites), _counted(steps))),
                None if own is None else f"{own:,.0f}",
                None if own is None or not speed else f"{own / speed:.2f}",
                None if memory is None else f"{memory:.2f}",
            )
        )
        values.append(
            {
                "arm": arm,
                "suites": None if is_base else vars(suites),
                "steps": None if is_base else vars(steps),
                "tokens_per_second": own,
                "memory_gib": memory,
            }
        )
    return TextTable(
        title=f"{table.title or table.name}: deviations",
        heading=("arm", "scores", "held-out losses", "tokens/s", "times the base", "GiB"),
        rows=rows,
        notes=(
            f"Deviations from {titles[base]} with the same seed beyond {SPREAD_FACTOR:g} standard "
            "deviations of its seeds, of all comparisons, and the largest difference in standard "
            "deviations. Scores are compared per suite, losses per saved step of the last stage.",
        ),
        values=tuple(values),
    )


def _score_deviations(
    records: Mapping[str, CellRecord], arm: str, base: str, scores: Sequence[CellScores]
) -> Deviations:
    """Those of an arm's scores on all suites."""
    of_suites = (
        count_deviations(_by_seed(records, arm, one), _by_seed(records, base, one))
        for one in scores
    )
    return sum(of_suites, Deviations())


def _counted(found: Deviations) -> str | None:
    if not found.compared:
        return None
    largest = "" if found.largest is None else f" (up to {found.largest:.1f})"
    return f"{found.beyond} of {found.compared}{largest}"


def _cells(records: Mapping[str, CellRecord], arm: str) -> dict[int, CellRecord]:
    """The finished cells of an arm by seed."""
    return {one.seed: one for one in records.values() if one.arm == arm and one.seed is not None}


def _by_seed(records: Mapping[str, CellRecord], arm: str, scores: CellScores) -> dict[int, float]:
    cells = _cells(records, arm)
    return {
        seed: scores.values[one.cell] for seed, one in cells.items() if one.cell in scores.values
    }


def _step_deviations(records: Mapping[str, CellRecord], arm: str, base: str) -> Deviations:
    mine, theirs = _losses(records, arm), _losses(records, base)
    steps = [step for step in mine if step in theirs]
    return sum(
        (count_deviations(mine[step], theirs[step]) for step in steps),
        Deviations(),
    )


def _losses(records: Mapping[str, CellRecord], arm: str) -> dict[int, dict[int, float]]:
    """The held-out losses of the last stage by step and seed."""
    found: dict[int, dict[int, float]] = {}
    for seed, one in _cells(records, arm).items():
        for row in one.stages[-1].held_out if one.stages else ():
            if isinstance(row.get(HELD_OUT), float):
                found.setdefault(int(row["step"]), {})[seed] = row[HELD_OUT]
    return found


def _median_of(records: Mapping[str, CellRecord], arm: str, field: str) -> float | None:
    cells = _cells(records, arm).values()
    given = [getattr(one.stages[-1], field) for one in cells if one.stages]
    known = [value for value in given if value is not None]
    return median(known) if known else None
