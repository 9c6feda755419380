"""Intervals, differences and tables against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from ablation_plans import WritePlan
from ablation_results import SCORING, answers_with, questions_of, write_cells

from mmmamba_cli.ablation import CellRecord, expand, load_plan
from mmmamba_cli.ablation.answers import Texts
from mmmamba_cli.ablation.cell_record import Timing, write_record
from mmmamba_cli.ablation.results_page import markdown
from mmmamba_cli.ablation.statistics import (
    paired_difference,
    replicates,
    t_interval,
    t_quantile,
)
from mmmamba_cli.ablation.tables import plan_tables


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # From printed tables of Student's t.
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)],
)
def test_quantiles_of_t(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-4)


def test_t_interval() -> None:
    # The deviation of 1, 2, 3 is 1.
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert t_interval([5.0]) is None


def test_a_difference_of_several_seeds() -> None:
    rows = [np.full(10_000, 1.0), np.full(10_000, 4.0)]
    found = paired_difference([1.0, 4.0], rows)
    # Both seeds are drawn twice with probability 1/4 each.
    assert (found.value, found.low, found.high) == (2.5, 1.0, 4.0)
    assert found.separated
    assert not paired_difference([0.0], [np.linspace(-1, 9, 10_000)]).separated


def test_pictures_are_drawn_and_not_questions() -> None:
    """Both answers of a picture are right or wrong together: the deviation is that of 4 draws."""
    questions = questions_of(4)
    answers = Texts.of([*["Yes", "No"] * 2, *["No", "Yes"] * 2])
    scores = questions.scores(SCORING, answers)
    assert questions.correct(SCORING, answers) == "11110000"
    drawn = replicates({"cell": scores}, "mean")["cell"]
    assert len(drawn) == 10_000
    assert float(np.mean(drawn)) == pytest.approx(50, abs=1)
    assert float(np.std(drawn)) == pytest.approx(100 * (0.25 / 4) ** 0.5, abs=0.5)


def test_texts_with_many_distinct_ones() -> None:
    for count in (3, 70):
        texts = [f"answer {i % count}" for i in range(100)]
        assert Texts.model_validate_json(Texts.of(texts).model_dump_json()).texts() == texts


def test_a_table(write_plan: WritePlan) -> None:
    file = write_plan({"seeds": [0, 1]})
    given = {
        "teacher": answers_with(0),
        "linear-seed0": answers_with(8),
        "linear-seed1": answers_with(6),
        "hybrid-seed0": answers_with(2),
        "hybrid-seed1": answers_with(0),
        "early-seed0": answers_with(8),
    }
    write_cells(file, given, questions_of(20))
    plan = load_plan(file)
    (table,), notes = plan_tables(plan, file.parent / "out", expand(plan))
    linear, hybrid, early = table.values
    # 60 and 70 % right: mean 65, deviation 7.07, half width 12.706 x 7.07 / sqrt(2) = 63.5.
    assert (linear["mean"], linear["seeds"], linear["difference"]) == (65, [0, 1], None)
    assert linear["half_width"] == pytest.approx(63.53, abs=0.01)
    assert (linear["retention"], linear["above_chance"]) == (65, 30)
    # Both seeds answer 6 of 20 pictures more: 30 points, deviation sqrt(0.3 x 0.7 / 20) or less.
    assert hybrid["mean"] == 95
    assert hybrid["difference"]["value"] == pytest.approx(30)
    assert 8 < hybrid["difference"]["low"] < 16
    assert 44 < hybrid["difference"]["high"] < 52
    assert hybrid["difference"]["separated"]
    # The same answers as those of the base with this seed: paired, nothing varies.
    assert early["difference"] == {"value": 0, "low": 0, "high": 0, "separated": False}
    assert notes == ["1 of 7 cells are not run: early (seeds 1)"]
    assert "| hybrid | 2 | 95.0 ± 63.5 | +30.0 |" in markdown(table)
    assert "+0.0 to +0.0, not separated" in markdown(table)


def test_a_seed_that_the_base_lacks_is_not_compared(write_plan: WritePlan) -> None:
    file = write_plan({"seeds": [0, 1]})
    given = {"linear-seed0": 8, "hybrid-seed0": 4, "hybrid-seed1": 0}
    write_cells(file, {name: answers_with(n) for name, n in given.items()}, questions_of(20))
    plan = load_plan(file)
    (table,), _ = plan_tables(plan, file.parent / "out", expand(plan))
    _, hybrid = table.values
    assert (hybrid["mean"], hybrid["difference"]["value"]) == (90, pytest.approx(20))
    assert (hybrid["retention"], hybrid["above_chance"]) == (None, None)


def test_a_failed_cell_is_noted_in_one_sentence(write_plan: WritePlan) -> None:
    file = write_plan()
    cell = expand(load_plan(file))[1]
    failed = CellRecord(
        plan="plan",
        cell=cell.name,
        arm=cell.arm,
        seed=0,
        digest=cell.digest,
        status="failed",
        error="stage3 ran out of memory. Process 7 has 3 GiB.",
        timing=Timing(date="2026-01-01"),
    )
    write_record(file.parent / "out", cell, failed)
    _, notes = plan_tables(load_plan(file), file.parent / "out", expand(load_plan(file)))
    assert notes[0] == "linear-seed0 failed: stage3 ran out of memory"


def test_results_of_other_settings_are_left_out(write_plan: WritePlan) -> None:
    file = write_plan()
    write_cells(file, {"linear-seed0": answers_with(8)}, questions_of(20))
    plan = load_plan(write_plan({"set": {"stages.stage1.lr": 0.5}}))
    tables, notes = plan_tables(plan, file.parent / "out", expand(plan))
    assert tables == []
    assert "left out, since they were made with other settings: linear-seed0" in notes
