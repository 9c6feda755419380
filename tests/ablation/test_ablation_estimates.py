"""Estimated seconds of cells: what is done is subtracted, and what is measured takes precedence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ablation_plans import WritePlan
from ablation_results import questions_of, suite_record

from mmmamba_cli.ablation import Cell, CellRecord, expand, load_plan
from mmmamba_cli.ablation import estimates as estimates_module
from mmmamba_cli.ablation.answers import write_questions
from mmmamba_cli.ablation.cell_record import StageRecord, Timing, first_sentence
from mmmamba_cli.ablation.estimates import Estimate, Estimator
from mmmamba_cli.ablation.plan import Plan
from mmmamba_cli.ablation.run_folders import RunState

HINTS = {"step": {"stage1": 5}, "suite": {"scenes": 60}, "cell": 7}


@pytest.fixture
def plan(write_plan: WritePlan) -> Plan:
    arms = [
        {"name": name, "stages": ["stage1"], "set": {"stages.stage1.steps": steps}}
        for name, steps in (("one", 100), ("two", 200))
    ]
    return load_plan(write_plan({"base": "one", "arms": arms, "estimates": HINTS}))


def cells_of(plan: Plan) -> dict[str, Cell]:
    return {cell.arm: cell for cell in expand(plan)}


def record_of(plan: Plan, arm: str, seconds: float, jobs: int, out: Path) -> CellRecord:
    cell = cells_of(plan)[arm]
    questions = questions_of(10)
    digest = write_questions(out, questions)
    return CellRecord(
        plan="plan",
        cell=cell.name,
        arm=arm,
        seed=0,
        digest=cell.digest,
        status="finished",
        stages=(
            StageRecord(name="stage1", product="s", steps=100, tokens=0, samples=0, loss=None),
        ),
        suites=(suite_record("scenes", questions, digest, ["Yes"] * 20),),
        timing=Timing(
            date=f"2026-01-0{jobs}",
            other=3,
            stages={"stage1": 100 * seconds},
            suites={"scenes": 40},
            jobs=jobs,
        ),
    )


def set_runs(monkeypatch: pytest.MonkeyPatch, states: dict[str, RunState]) -> None:
    """Give the runs of cells a state, by the name of their cell."""

    def read(folder: Path) -> RunState:
        return states.get(folder.name.rpartition("-")[0], RunState())

    monkeypatch.setattr(estimates_module, "read_run_state", read)


@pytest.mark.parametrize(
    ("state", "shared", "expected"),
    [
        (RunState(), (), Estimate(200 * 5 + 60, 7)),
        (RunState(saved_steps={"stage1": 150, "stage2": 9}), (), Estimate(50 * 5 + 60, 7)),
        (RunState(done=("stage1",)), (), Estimate(60, 7)),
        (RunState(), ("stage1",), Estimate(60, 7)),
    ],
)
def test_saved_steps_are_subtracted(
    state: RunState,
    shared: tuple[str, ...],
    expected: Estimate,
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_runs(monkeypatch, {"two-seed0": state})
    estimator = Estimator(plan.estimates, work=tmp_path)
    assert estimator.estimate(cells_of(plan)["two"], shared) == expected


def test_kept_answers_are_subtracted(plan: Plan, tmp_path: Path) -> None:
    two = cells_of(plan)["two"]
    folder = tmp_path / two.folder / "evals" / "scenes"
    folder.mkdir(parents=True)
    lines = [{"answers_to": {"index": 1}}, *({"index": str(n), "prediction": ""} for n in range(5))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "predictions-1.jsonl").write_text(text)
    record = record_of(plan, "one", 2, jobs=1, out=tmp_path / "out")
    # 5 of the 20 questions that the other cell was asked.
    found = Estimator(plan.estimates, [record], work=tmp_path).estimate(two)
    assert found == Estimate(200 * 2 + 40 * 0.75, 3)


def test_the_steps_of_a_run_count_more_than_those_of_others(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(plan)
    record = record_of(plan, "one", 2, jobs=1, out=tmp_path)
    own = RunState(saved_steps={"stage1": 100}, step_seconds={"stage1": 0.5})
    set_runs(monkeypatch, {"two-seed0": own})
    measured = Estimator(plan.estimates, [record], work=tmp_path)
    assert measured.estimate(cells["two"]) == Estimate(100 * 0.5 + 40, 3)
    # Without records, an unfinished run of the plan counts more than the hint.
    unknown = Estimator(plan.estimates, work=tmp_path)
    assert unknown.estimate(cells["one"]) == Estimate(100 * 5 + 60, 7)
    unknown.read_run(cells["two"])
    assert unknown.estimate(cells["one"]) == Estimate(100 * 0.5 + 60, 7)


def test_cells_beside_as_many_others_count_more(plan: Plan, tmp_path: Path) -> None:
    records = [record_of(plan, "one", each, jobs, tmp_path) for jobs, each in ((1, 1), (4, 3))]
    two = cells_of(plan)["two"]
    for jobs, each in ((1, 1.0), (4, 3.0), (2, 2.0)):
        found = Estimator(plan.estimates, records, work=tmp_path, jobs=jobs).estimate(two)
        assert found == Estimate(200 * each + 40, 3)


def test_a_failure_in_one_sentence() -> None:
    allocator = "CUDA out of memory. Tried to allocate 1.69 GiB. GPU 0 has 139.80 GiB. See http://x"
    message = f"stage finetune ran out of device memory after step 0: {allocator}"
    assert first_sentence(message) == (
        "stage finetune ran out of device memory after step 0: CUDA out of memory"
    )
    assert first_sentence("one\ntwo") == "one"
    long = first_sentence("a" * 500)
    assert len(long) == 160
    assert long.endswith("a…")
