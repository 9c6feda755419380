"""Scores of a suite's categories, with their shares of the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmmamba_cli.ablation.cell_record import CellRecord
from mmmamba_cli.ablation.plan import TEACHER_ARM, Plan, Table
from mmmamba_cli.ablation.suite_scores import SuiteScores, cells_by_arm, percent_of_teacher
from mmmamba_cli.ablation.text_table import TextTable


def category_table(
    plan: Plan, table: Table, scores: SuiteScores, records: Mapping[str, CellRecord]
) -> TextTable | None:
    """A row for each category; None if the suite's rule has none, or no arm has a result."""
    cells = cells_by_arm(records)
    titles = {arm.name: arm.title or arm.name for arm in plan.arms}
    arms = [
        arm
        for arm in table.arms
        if arm != TEACHER_ARM and any(name in scores.values for name in cells.get(arm, ()))
    ]
    if not arms or not scores.categories:
        return None
    heading = ["category", TEACHER_ARM]
    for arm in arms:
        heading += [titles[arm], "% of the teacher", "above chance"]
    rows: list[tuple[object, ...]] = []
    values: list[dict[str, Any]] = []
    for category in scores.categories:
        teacher = scores.mean(cells[TEACHER_ARM], category)
        row: list[float | None] = [teacher]
        shares: dict[str, Any] = {}
        for arm in arms:
            mean = scores.mean(cells[arm], category)
            raw = percent_of_teacher(mean, teacher)
            above = percent_of_teacher(mean, teacher, scores.chance_of(category))
            row += [mean, raw, above]
            shares[arm] = {"mean": mean, "retention": raw, "above_chance": above}
        rows.append((category, *(None if one is None else f"{one:.1f}" for one in row)))
        values.append({"category": category, TEACHER_ARM: teacher, "arms": shares})
    return TextTable(
        title=f"{table.title or table.name}: {scores.use.title} by category",
        heading=tuple(heading),
        rows=rows,
        notes=(),
        values=tuple(values),
    )
