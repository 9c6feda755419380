"""The marks of a plan: scores that an arm is to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmmamba_cli.ablation.cell_record import CellRecord
from mmmamba_cli.ablation.plan import TEACHER_ARM, WORST, Mark, Plan
from mmmamba_cli.ablation.suite_scores import SuiteScores, cells_by_arm, percent_of_teacher
from mmmamba_cli.ablation.text_table import TextTable
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe.problems import join_or, suggest

UNITS = {"score": "", "teacher": " % of the teacher", "above-chance": " % above chance"}


def mark_table(
    plan: Plan, scores: Mapping[str, SuiteScores], records: Mapping[str, CellRecord]
) -> TextTable | None:
    """A row for each mark, the mean over the seeds so far; None for a plan without marks.

    Raises `RecipeError` for a category that the suite does not have.
    """
    if not plan.marks:
        return None
    titles = {arm.name: arm.title or arm.name for arm in plan.arms}
    cells = cells_by_arm(records)
    rows: list[tuple[object, ...]] = []
    values = []
    for position, mark in enumerate(plan.marks):
        suite = scores[mark.suite]
        _check_category(mark, suite, f"marks[{position}].category")
        mine = [name for name in cells.get(mark.arm, ()) if name in suite.values]
        category, value = mark_value(mark, suite, mine, cells[TEACHER_ARM])
        reached = None if value is None else value >= mark.at_least
        of = suite.metric or "score" if mark.category is None else mark.category
        if mark.category == WORST:
            of = "worst category" if category is None else f"worst category ({category})"
        rows.append(
            (
                titles[mark.arm],
                mark.suite,
                of,
                f"at least {mark.at_least:g}{UNITS[mark.share]}",
                None if value is None else f"{value:.1f}",
                len(mine) or None,
                {None: "not measured", True: "reached", False: "not reached"}[reached],
            )
        )
        values.append(
            {
                **mark.model_dump(mode="json"),
                "worst": category if mark.category == WORST else None,
                "value": value,
                "seeds": len(mine),
                "reached": reached,
            }
        )
    return TextTable(
        title="Marks",
        heading=("arm", "suite", "score", "mark", "value", "seeds", "result"),
        rows=rows,
        notes=(),
        values=tuple(values),
    )


def _check_category(mark: Mark, suite: SuiteScores, place: str) -> None:
    known = [*suite.categories, WORST]
    # The categories are those of the results.
    if suite.values and mark.category is not None and mark.category not in known:
        raise RecipeError(
            f"{place}: is {mark.category}, which is no category of {mark.suite}: give "
            f"{join_or(known)}{suggest(mark.category, known)}"
        )


def mark_value(
    mark: Mark, suite: SuiteScores, cells: Sequence[str], teacher: Sequence[str]
) -> tuple[str | None, float | None]:
    """The category of a mark and the value that it is compared with, the mean over `cells`.

    The category is None for the suite's score; the value is None if it is not known.
    """
    if mark.category is None:
        return None, _share(mark, suite, cells, teacher, None)
    names = suite.categories if mark.category == WORST else (mark.category,)
    found = [
        (value, name)
        for name in names
        if (value := _share(mark, suite, cells, teacher, name)) is not None
    ]
    if not found:
        return None, None
    value, name = min(found)
    return name, value


def _share(
    mark: Mark,
    suite: SuiteScores,
    cells: Sequence[str],
    teacher: Sequence[str],
    category: str | None,
) -> float | None:
    score = suite.mean(cells, category)
    if mark.share == "score":
        return score
    chance = suite.chance if category is None else suite.chance_of(category)
    whole = suite.mean(teacher, category)
    return percent_of_teacher(score, whole, chance if mark.share == "above-chance" else 0.0)
