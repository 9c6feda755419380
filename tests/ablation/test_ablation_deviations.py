"""Deviations beyond the spread of seeds, against numbers computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ablation_plans import WritePlan
from test_ablation_statistics import answers_with, questions_of, write_cells

from mmmamba_cli.ablation import expand, load_plan
from mmmamba_cli.ablation.cell_record import StageRecord
from mmmamba_cli.ablation.deviations import Deviations, count_deviations
from mmmamba_cli.ablation.record_builder import stage_record
from mmmamba_cli.ablation.tables import plan_tables


def test_differences_within_the_spread_are_none() -> None:
    # The standard deviation of 1, 2, 3 is 1, so that only differences above 2 count.
    base = {0: 1.0, 1: 2.0, 2: 3.0}
    assert count_deviations({0: 3.0, 1: 2.0, 2: 1.0}, base) == Deviations(3, 0, 2.0)
    assert count_deviations({0: 3.1, 1: -1.0, 5: 99.0}, base) == Deviations(2, 2, 3.0)
    assert count_deviations({}, base) == Deviations(0, 0, None)


def test_a_base_of_one_seed_has_no_spread() -> None:
    assert count_deviations({0: 3.0}, {0: 1.0}) == Deviations()
    # Equal seeds: every difference is a deviation, and no multiple of the spread.
    assert count_deviations({0: 1.0, 1: 2.0}, {0: 1.0, 1: 1.0}) == Deviations(2, 1, None)


def stage(loss: float, speed: float | None, memory: float | None) -> dict[str, object]:
    held_out = tuple({"step": step, "loss": loss / step} for step in (1, 2))
    found = StageRecord(
        name="stage3",
        product="x",
        steps=2,
        tokens=10,
        samples=2,
        loss=loss,
        tokens_per_second=speed,
        memory_gib=memory,
        held_out=held_out,
    )
    return found.model_dump(mode="json")


def test_the_table_of_a_plan(write_plan: WritePlan) -> None:
    tables = [{"name": "all", "arms": ["linear", "hybrid"], "deviations": True}]
    file = write_plan({"seeds": [0, 1], "tables": tables})
    given = {
        "linear-seed0": answers_with(8),
        "linear-seed1": answers_with(6),
        # 60 and 70 points are 7.07 apart in standard deviations: 75 is 15 away, 60 is 10.
        "hybrid-seed0": answers_with(5),
        "hybrid-seed1": answers_with(8),
    }
    write_cells(file, given, questions_of(20))
    stages = {
        "linear-seed0": stage(1.0, 100.0, 2.0),
        "linear-seed1": stage(1.1, 300.0, 2.0),
        # The deviation of 1.0 and 1.1 is 0.0707: 0.3 is far beyond twice that, 0.1 is not.
        "hybrid-seed0": stage(1.3, 500.0, 1.0),
        "hybrid-seed1": stage(1.2, 500.0, 1.0),
    }
    for name, one in stages.items():
        cell = file.parent / "out" / f"{name}.json"
        record = json.loads(cell.read_text(encoding="utf-8"))
        cell.write_text(json.dumps({**record, "stages": [one]}), encoding="utf-8")
    plan = load_plan(file)
    found, _ = plan_tables(plan, file.parent / "out", expand(plan))
    table = found[-1]
    assert table.title == "all: deviations"
    linear, hybrid = table.values
    assert linear["suites"] is None and linear["tokens_per_second"] == 200
    assert hybrid["suites"]["compared"] == 2
    assert hybrid["suites"]["beyond"] == 1
    assert hybrid["suites"]["largest"] == pytest.approx(15 / 7.0711, abs=1e-3)
    # Two steps of two seeds.
    assert (hybrid["steps"]["compared"], hybrid["steps"]["beyond"]) == (4, 2)
    assert table.rows[1][1:] == ("1 of 2 (up to 2.1)", "2 of 4 (up to 4.2)", "500", "2.50", "1.00")


def test_no_table_before_two_seeds_are_done(write_plan: WritePlan) -> None:
    tables = [{"name": "all", "arms": ["linear", "hybrid"], "deviations": True}]
    file = write_plan({"seeds": [0, 1], "tables": tables})
    given = {"linear-seed0": answers_with(8), "hybrid-seed0": answers_with(5)}
    write_cells(file, given, questions_of(20))
    plan = load_plan(file)
    found, _ = plan_tables(plan, file.parent / "out", expand(plan))
    assert [table.title for table in found] == ["all: scenes"]


def test_speed_and_memory_of_a_stage(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 2.0, "tokens_per_second": 10.0, "memory_gib": 1.5},
        {"step": 2, "loss": 1.0, "tokens_per_second": 90.0, "memory_gib": 2.5},
        {"step": 3, "loss": 0.5, "tokens_per_second": 80.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    class Run:
        def product_folder(self, name: str) -> Path:
            return tmp_path

    class Product:
        def __init__(self) -> None:
            self.name, self.stages = "stage3", ("stage3",)
            self.metrics = {"step": 3, "tokens": 30, "samples": 3}

    found = stage_record(Run(), Product())  # type: ignore[arg-type]
    assert (found.tokens_per_second, found.memory_gib) == (80.0, 2.5)
