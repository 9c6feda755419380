"""Scores of generated answers beside those by likelihood, and whether they order arms alike.

A student can be close to its teacher by likelihood and far behind it in what it writes
(arXiv 2603.26556).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from mmmamba_cli.ablation.cell_record import CellRecord
from mmmamba_cli.ablation.plan import TEACHER_ARM, Plan, SuiteUse, Table
from mmmamba_cli.ablation.suite_scores import SuiteScores, cells_by_arm
from mmmamba_cli.ablation.text_table import TextTable


def generated_counterparts(plan: Plan) -> dict[str, str]:
    """By the label of each suite by likelihood, that of the same suite with generated answers."""
    found: dict[str, str] = {}
    for use in plan.suites:
        same = [one.title for one in plan.suites if _differ_in_answers_alone(one, use)]
        if use.is_by_likelihood and same:
            found[use.title] = same[0]
    return found


def _differ_in_answers_alone(generated: SuiteUse, other: SuiteUse) -> bool:
    left_out = {"answers", "label", "batch", "arms", "max_new_tokens"}
    return not generated.is_by_likelihood and generated.model_dump(
        exclude=left_out
    ) == other.model_dump(exclude=left_out)


def comparison_tables(
    plan: Plan,
    table: Table,
    scores: Mapping[str, SuiteScores],
    records: Mapping[str, CellRecord],
) -> list[TextTable]:
    """A table for each suite with both kinds of answers and an arm that has both."""
    found = []
    for likelihood, generated in generated_counterparts(plan).items():
        if table.suites and generated not in table.suites:
            continue
        made = _comparison_table(plan, table, scores[generated], scores[likelihood], records)
        if made is not None:
            found.append(made)
    return found


def _comparison_table(
    plan: Plan,
    table: Table,
    generated: SuiteScores,
    likelihood: SuiteScores,
    records: Mapping[str, CellRecord],
) -> TextTable | None:
    """Scores of the cells that have both, and how far they are behind the teacher."""
    titles = {arm.name: arm.title or arm.name for arm in plan.arms}
    cells = cells_by_arm(records)
    teacher = [one.mean(cells[TEACHER_ARM]) for one in (generated, likelihood)]
    rows: list[tuple[object, ...]] = []
    values = []
    for arm in table.arms:
        both = [
            name
            for name in cells.get(arm, ())
            if name in generated.values and name in likelihood.values
        ]
        if not both:
            continue
        means = [one.mean(both) for one in (generated, likelihood)]
        behind = [
            None if whole is None or mean is None or arm == TEACHER_ARM else whole - mean
            for whole, mean in zip(teacher, means, strict=True)
        ]
        values.append(
            {
                "arm": arm,
                "seeds": len(both),
                "generated": means[0],
                "generated_behind": behind[0],
                "likelihood": means[1],
                "likelihood_behind": behind[1],
            }
        )
        seeds = None if arm == TEACHER_ARM else len(both)
        shown = [None if one is None else f"{one:.1f}" for one in (*means, *behind)]
        rows.append((titles.get(arm, arm), seeds, shown[0], shown[2], shown[1], shown[3]))
    students = [one for one in values if one["arm"] != TEACHER_ARM]
    if not students:
        return None
    note = _order_note(
        [float(str(one["generated"])) for one in students],
        [float(str(one["likelihood"])) for one in students],
    )
    return TextTable(
        title=f"{table.title or table.name}: {generated.use.title}, generated and by likelihood",
        heading=(
            "arm",
            "seeds",
            "generated",
            "behind the teacher",
            "by likelihood",
            "behind by likelihood",
        ),
        rows=rows,
        notes=(note,) if note else (),
        values=tuple(values),
    )


def _order_note(generated: Sequence[float], likelihood: Sequence[float]) -> str:
    count = len(generated)
    if count < 2:
        return ""
    tau = kendall_tau(generated, likelihood)
    known = "not defined, all of them are equal in one" if tau is None else f"{tau:.2f}"
    return f"Kendall's tau of the two orders of the {count} students: {known}."


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b (Biometrika 33, 1945) of two orders; None if all are equal in one.

    1: the same order, -1: the reverse. Pairs that are equal in one order count for neither.
    """
    pairs = [
        (_sign(first[i] - first[j]), _sign(second[i] - second[j]))
        for i, j in combinations(range(len(first)), 2)
    ]
    agreement = sum(a * b for a, b in pairs)
    untied = sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs)
    return None if untied == 0 else agreement / math.sqrt(untied)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
