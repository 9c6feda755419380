"""Tables of a plan, from the JSON of its cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmmamba_cli.ablation.category_table import category_table
from mmmamba_cli.ablation.cell_record import (
    CellRecord,
    finished_records,
    first_sentence,
    missing_suites,
    read_records,
)
from mmmamba_cli.ablation.cells import Cell
from mmmamba_cli.ablation.deviations import deviation_table
from mmmamba_cli.ablation.likelihood_comparison import comparison_tables, generated_counterparts
from mmmamba_cli.ablation.marks import mark_table
from mmmamba_cli.ablation.plan import TEACHER_ARM, Plan, Table
from mmmamba_cli.ablation.statistics import Difference, t_interval
from mmmamba_cli.ablation.suite_scores import SuiteScores, percent_of_teacher
from mmmamba_cli.ablation.text_table import TextTable
from mmmamba_cli.errors import name_some


@dataclass(frozen=True)
class ArmScore:
    """One row: an arm's scores on one suite, over its finished seeds."""

    arm: str
    seeds: tuple[int | None, ...]
    mean: float
    half_width: float | None
    difference: Difference | None
    retention: float | None
    above_chance: float | None


def plan_tables(plan: Plan, out: Path, cells: Sequence[Cell]) -> tuple[list[TextTable], list[str]]:
    """All tables of a plan, and sentences about cells that are in none."""
    records, outdated = read_records(out, cells)
    done = finished_records(records)
    scores = {use.title: SuiteScores(use, out, done) for use in plan.suites}
    tables = [mark_table(plan, scores, done)]
    for table in plan.all_tables:
        chosen = _suites_of(plan, table, scores)
        tables += [_score_table(plan, table, one, done) for one in chosen]
        if table.categories:
            tables += [category_table(plan, table, one, done) for one in chosen]
        tables += comparison_tables(plan, table, scores, done)
        tables.append(_held_out_table(plan, table, done))
        if table.deviations:
            tables.append(deviation_table(plan, table, chosen, done))
    return [one for one in tables if one is not None], cell_notes(cells, records, outdated)


def _suites_of(plan: Plan, table: Table, scores: Mapping[str, SuiteScores]) -> list[SuiteScores]:
    """The suites of a table: those that it names, else those that are no second kind of answers.

    A suite by likelihood that is also generated has a table in `likelihood_comparison`.
    """
    if table.suites:
        return [scores[use.title] for use in plan.suites if use.title in table.suites]
    counterparts = generated_counterparts(plan)
    return [scores[use.title] for use in plan.suites if use.title not in counterparts]


def cell_notes(
    cells: Sequence[Cell], records: Mapping[str, CellRecord], outdated: Sequence[Cell]
) -> list[str]:
    """Which cells failed, are not run, or have results of other settings."""
    notes = [
        f"{name} failed: {first_sentence(one.error or '')}"
        for name, one in records.items()
        if one.status == "failed"
    ]
    old = {cell.name for cell in outdated}
    missing = [cell for cell in cells if cell.name not in records and cell.name not in old]
    notes += _gained_notes(cells, records)
    if missing:
        notes.append(f"{len(missing)} of {len(cells)} cells are not run: {_by_seeds(missing)}")
    if old:
        notes.append(
            f"left out, since they were made with other settings: {name_some(sorted(old))}"
        )
    return notes


def _gained_notes(cells: Sequence[Cell], records: Mapping[str, CellRecord]) -> list[str]:
    """Finished cells without answers to suites that the plan has gained, by these suites."""
    gained: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        record = records.get(cell.name)
        if record is not None and record.status == "finished":
            labels = tuple(use.title for use in missing_suites(cell, record))
            gained.setdefault(labels, []).append(cell)
    return [
        f"{len(found)} finished cells have no answers to {', '.join(labels)}, which were added to "
        f"the plan later: {_by_seeds(found)}"
        for labels, found in gained.items()
        if labels
    ]


def _by_seeds(cells: Sequence[Cell]) -> str:
    """The arms of cells, those that lack the same seeds together."""
    seeds: dict[str, list[int]] = {}
    for cell in cells:
        found = seeds.setdefault(cell.arm, [])
        if cell.seed is not None:
            found.append(cell.seed)
    arms: dict[tuple[int, ...], list[str]] = {}
    for arm, found in seeds.items():
        arms.setdefault(tuple(found), []).append(arm)
    return "; ".join(
        ", ".join(names) + (f" (seeds {', '.join(map(str, found))})" if found else "")
        for found, names in arms.items()
    )


def arm_scores(
    arms: Sequence[str], base: str, scores: SuiteScores, records: Mapping[str, CellRecord]
) -> list[ArmScore]:
    """A row for each arm that has a finished cell."""
    cells: dict[str, dict[int | None, str]] = {}
    for name in scores.values:
        record = records[name]
        cells.setdefault(record.arm, {})[record.seed] = name
    teacher = cells.get(TEACHER_ARM, {}).get(None)
    teacher_score = None if teacher is None else scores.values[teacher]
    chance = scores.chance
    rows = []
    for arm in arms:
        mine = cells.get(arm, {})
        if not mine:
            continue
        values = [scores.values[name] for name in mine.values()]
        mean = float(np.mean(values))
        theirs = cells.get(base, {})
        if arm == TEACHER_ARM:
            pairs = [(mine[None], name) for name in theirs.values()]
        else:
            pairs = [(name, theirs[seed]) for seed, name in mine.items() if seed in theirs]
        rows.append(
            ArmScore(
                arm=arm,
                seeds=tuple(mine),
                mean=mean,
                half_width=t_interval(values),
                difference=scores.difference(pairs) if arm != base and pairs else None,
                retention=percent_of_teacher(mean, teacher_score),
                above_chance=percent_of_teacher(mean, teacher_score, chance),
            )
        )
    return rows


def _score_table(
    plan: Plan, table: Table, scores: SuiteScores, records: Mapping[str, CellRecord]
) -> TextTable | None:
    base = table.base or plan.base
    found = arm_scores(table.arms, base, scores, records)
    if not found:
        return None
    titles = {arm.name: arm.title or arm.name for arm in plan.arms}
    heading = (
        "arm",
        "seeds",
        scores.metric,
        f"above {titles[base]}",
        "95 %",
        "% of the teacher",
        "above chance",
    )
    rows: list[tuple[object, ...]] = []
    for one in found:
        rows.append(
            (
                titles.get(one.arm, one.arm),
                None if one.seeds == (None,) else len(one.seeds),
                format_mean(one.mean, one.half_width),
                None if one.difference is None else f"{one.difference.value:+.1f}",
                _interval(one.difference),
                None if one.retention is None else f"{one.retention:.1f}",
                None if one.above_chance is None else f"{one.above_chance:.1f}",
            )
        )
    return TextTable(
        title=f"{table.title or table.name}: {scores.use.title}",
        heading=heading,
        rows=rows,
        notes=(table.note,) if table.note else (),
        values=tuple(_as_dict(one) for one in found),
    )


def format_mean(mean: float, half_width: float | None, digits: int = 1) -> str:
    """A mean with half its t interval over seeds, if there are several."""
    text = f"{mean:.{digits}f}"
    return text if half_width is None else f"{text} ± {half_width:.{digits}f}"


def _interval(difference: Difference | None) -> str | None:
    if difference is None:
        return None
    text = f"{difference.low:+.1f} to {difference.high:+.1f}"
    return text if difference.separated else f"{text}, not separated"


def _as_dict(one: ArmScore) -> dict[str, Any]:
    found = {**vars(one), "seeds": list(one.seeds)}
    if one.difference is not None:
        found["difference"] = {**vars(one.difference), "separated": one.difference.separated}
    return found


def _held_out_table(
    plan: Plan, table: Table, records: Mapping[str, CellRecord]
) -> TextTable | None:
    """The held-out metrics of the last stage of each arm at its last step."""
    titles = {arm.name: arm.title or arm.name for arm in plan.arms}
    rows: list[tuple[object, ...]] = []
    values: list[dict[str, Any]] = []
    for arm in table.arms:
        found = [
            (one.stages[-1].name, one.stages[-1].held_out[-1])
            for one in records.values()
            if one.arm == arm and one.stages and one.stages[-1].held_out
        ]
        if not found:
            continue
        row: dict[str, Any] = {"arm": arm, "stage": found[0][0], "seeds": len(found)}
        shown: list[object] = [titles.get(arm, arm), row["stage"], len(found)]
        for metric, scale in (("loss", 1.0), ("agreement", 100.0), ("student_nll", 1.0)):
            given = [m[metric] for _, m in found if isinstance(m.get(metric), float)]
            mean = float(np.mean(given)) * scale if given else None
            half = t_interval([scale * one for one in given]) if given else None
            row |= {metric: mean, f"{metric}_half_width": half}
            shown.append(None if mean is None else format_mean(mean, half, 1 if scale > 1 else 4))
        rows.append(tuple(shown))
        values.append(row)
    if not rows:
        return None
    return TextTable(
        title=f"{table.title or table.name}: held-out data",
        heading=("arm", "last stage", "seeds", "loss", "same token, %", "nats per answer token"),
        rows=rows,
        notes=(),
        values=tuple(values),
    )
