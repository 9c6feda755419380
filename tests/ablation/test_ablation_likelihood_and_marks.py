"""Both ways to answer, marks and categories in the tables, against numbers counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ablation_plans import PLAN, WritePlan
from ablation_results import answers_with, questions_of, write_cells

from mmmamba_cli.ablation import expand, load_plan, read_records
from mmmamba_cli.ablation.cell_record import missing_suites
from mmmamba_cli.ablation.likelihood_comparison import kendall_tau
from mmmamba_cli.ablation.tables import plan_tables
from mmmamba_cli.errors import RecipeError

BOTH = [{**PLAN["suites"][0], "answers": ["generated", "likelihood"]}]


def tables_of(file: Path) -> tuple[dict[str, Any], list[str]]:
    plan = load_plan(file)
    tables, notes = plan_tables(plan, file.parent / "out", expand(plan))
    return {one.title: one for one in tables}, notes


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        # One of three pairs is reversed: (2 - 1) / 3.
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        # A tie in the second: 2 / sqrt(3 x 2).
        ([1, 2, 3], [1, 2, 2], 2 / 6**0.5),
        ([1, 2], [5, 5], None),
    ],
)
def test_kendall_tau(first: list[float], second: list[float], tau: float | None) -> None:
    assert kendall_tau(first, second) == (None if tau is None else pytest.approx(tau))


def test_answers_in_both_ways(write_plan: WritePlan) -> None:
    file = write_plan({"suites": BOTH})
    wrong = {"teacher": 0, "linear-seed0": 8, "hybrid-seed0": 4, "early-seed0": 2}
    chosen = {"teacher": 0, "linear-seed0": 1, "hybrid-seed0": 2, "early-seed0": 0}
    write_cells(
        file,
        {name: answers_with(count) for name, count in wrong.items()},
        questions_of(20),
        {name: answers_with(count) for name, count in chosen.items()},
    )
    tables, notes = tables_of(file)
    # Likelihood has no table of scores of its own.
    assert list(tables) == ["plan: scenes", "plan: scenes, generated and by likelihood"]
    table = tables["plan: scenes, generated and by likelihood"]
    linear, hybrid, early = table.values
    assert (linear["generated"], linear["generated_behind"]) == (60, 40)
    assert (linear["likelihood"], linear["likelihood_behind"]) == (95, 5)
    assert (hybrid["likelihood_behind"], early["likelihood_behind"]) == (10, 0)
    # linear and hybrid change places: one of three pairs.
    assert table.notes == ("Kendall's tau of the two orders of the 3 students: 0.33.",)
    assert notes == []


def test_a_plan_that_gains_a_suite_keeps_its_results(write_plan: WritePlan) -> None:
    file = write_plan()
    write_cells(
        file, {"linear-seed0": answers_with(8), "teacher": answers_with(0)}, questions_of(20)
    )
    plan = load_plan(write_plan({"suites": BOTH}))
    cells = {cell.name: cell for cell in expand(plan)}
    found, outdated = read_records(file.parent / "out", list(cells.values()))
    assert (sorted(found), outdated) == (["linear-seed0", "teacher"], [])
    missing = missing_suites(cells["linear-seed0"], found["linear-seed0"])
    assert [use.title for use in missing] == ["scenes-likelihood"]
    tables, notes = tables_of(file)
    assert list(tables) == ["plan: scenes"]
    assert "2 finished cells have no answers to scenes-likelihood" in notes[0]
    # The same suite with other options is another one.
    file = write_plan({"suites": [{**BOTH[0], "limit": 3}]})
    cells = {cell.name: cell for cell in expand(load_plan(file))}
    assert len(read_records(file.parent / "out", list(cells.values()))[1]) == 2


def mark(**fields: Any) -> dict[str, Any]:
    return {"arm": "linear", "suite": "scenes", **fields}


def test_marks_and_categories(write_plan: WritePlan) -> None:
    """20 pictures, count and colour in turn; the student has the first 5 wrong: 3 and 2 of 10."""
    marks = [
        mark(at_least=75),
        mark(at_least=75.1),
        mark(category="worst", at_least=70),
        mark(category="worst", share="score", at_least=70.5),
        mark(category="colour", at_least=88),
        mark(category="colour", share="above-chance", at_least=75),
        mark(arm="hybrid", at_least=1),
    ]
    tables = [{"name": "all", "arms": ["linear", "teacher"], "categories": True}]
    file = write_plan({"marks": marks, "tables": tables})
    # The teacher has a colour picture wrong: 90 of 100; above chance 80 against 60.
    teacher = answers_with(0)
    teacher[2:4] = ["No", "Yes"]
    given = {"linear-seed0": answers_with(5), "teacher": teacher}
    write_cells(file, given, questions_of(20, ("count", "colour")))
    tables_found, _ = tables_of(file)
    values = tables_found["Marks"].values
    assert [one["value"] for one in values] == [
        pytest.approx(value)
        for value in (100 * 75 / 95, 100 * 75 / 95, 70, 70, 100 * 80 / 90, 75, None)
    ]
    assert [one["reached"] for one in values] == [True, True, True, False, True, True, None]
    assert values[2]["worst"] == "count"
    assert tables_found["Marks"].rows[6][4:] == (None, None, "not measured")
    count, colour = tables_found["all: scenes by category"].values
    assert count["arms"]["linear"] == {"mean": 70, "retention": 70, "above_chance": 40}
    assert (colour["teacher"], colour["arms"]["linear"]["above_chance"]) == (90, 75)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suites": [{**BOTH[0], "answers": "likely"}]}, "suites[0].answers: is 'likely', must be"),
        ({"suites": [{**BOTH[0], "answers": []}]}, "suites[0].answers: is [], must be generated"),
        (
            {"suites": [*BOTH, {"name": "mme", "label": "scenes-likelihood"}]},
            "suites[2].label: is scenes-likelihood, which is the name of suites[1] already",
        ),
        ({"marks": [mark(arm="liner", at_least=1)]}, "marks[0].arm: is liner, which is no arm"),
        ({"marks": [mark(suite="mme", at_least=1)]}, "marks[0].suite: is mme, which is no suite"),
        ({"marks": [mark(share="raw", at_least=1)]}, "marks[0].share: is 'raw', must be one of"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str, write_plan: WritePlan) -> None:
    with pytest.raises(RecipeError) as caught:
        load_plan(write_plan(changes))
    assert words in str(caught.value)


def test_a_category_that_the_suite_lacks(write_plan: WritePlan) -> None:
    file = write_plan({"marks": [mark(category="cuont", at_least=1)]})
    write_cells(file, {"linear-seed0": answers_with(5)}, questions_of(20))
    with pytest.raises(RecipeError, match=r"marks\[0\].category: is cuont.*did you mean count\?"):
        tables_of(file)
