"""Which cells the runner starts, and which it leaves: a pool and a clock that are not real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from ablation_plans import WritePlan

from mmmamba_cli.ablation import Cell, CellRecord, expand, load_plan
from mmmamba_cli.ablation import runner as runner_module
from mmmamba_cli.ablation.cell_record import StageRecord, Timing, write_record
from mmmamba_cli.ablation.cells import Trunk
from mmmamba_cli.ablation.plan_progress import Unit, find_progress
from mmmamba_cli.ablation.runner import Outcome, RunnerEvents, TimeLimit, UnitEnd, run_plan

QUIET = RunnerEvents(lambda text: None, lambda done, total, left: None, lambda: False)


@dataclass
class FakePool:
    """Takes `seconds` for a step of a cell's own stages; the longest unit ends last."""

    out: Path
    seconds: float
    now: float = 0.0
    started: list[str] = field(default_factory=list)
    units: list[tuple[float, Unit]] = field(default_factory=list)

    @property
    def running(self) -> Sequence[Unit]:
        return [unit for _, unit in self.units]

    def start(self, unit: Unit, parent: Trunk | None, deadline: float | None) -> None:
        self.started.append("+".join(unit.stages) if isinstance(unit, Trunk) else unit.name)
        assert unit.recipe is not None
        done = parent.stages if parent else ()
        steps = sum(s.steps for s in unit.recipe.stages if s.name not in done)
        self.units.append((self.now + steps * self.seconds, unit))

    def wait(self) -> list[UnitEnd]:
        self.units.sort(key=lambda pair: pair[0])
        self.now, unit = self.units.pop(0)
        if isinstance(unit, Cell):
            assert unit.recipe is not None
            steps = {stage.name: stage.steps for stage in unit.recipe.stages}
            record = CellRecord(
                plan="plan",
                cell=unit.name,
                arm=unit.arm,
                seed=unit.seed,
                digest=unit.digest,
                status="finished",
                stages=tuple(
                    StageRecord(name=n, product=n, steps=k, tokens=0, samples=0, loss=None)
                    for n, k in steps.items()
                ),
                timing=Timing(
                    date=str(self.now), stages={n: k * self.seconds for n, k in steps.items()}
                ),
            )
            write_record(self.out, unit, record)
        return [UnitEnd(unit, "finished")]


def run(
    file: Path, pool: FakePool, monkeypatch: pytest.MonkeyPatch, seconds: float, jobs: int = 1
) -> Outcome:
    plan = load_plan(file)
    cells = expand(plan)
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=lambda: pool.now))
    return run_plan(
        plan,
        find_progress(pool.out, file.parent / "work", cells, cells, retry=False, overwrite=False),
        pool,
        out=pool.out,
        work=file.parent / "work",
        keep=(),
        jobs=jobs,
        limit=TimeLimit(seconds, pool.now),
        events=QUIET,
    )


def plan_of(write_plan: WritePlan, steps: dict[str, int], hint: float) -> Path:
    arms = [
        {"name": name, "stages": ["stage1"], "set": {"stages.stage1.steps": count}}
        for name, count in steps.items()
    ]
    given = {"base": "one", "arms": arms, "suites": []}
    return write_plan({**given, "estimates": {"step": {"stage1": hint}}})


def test_cells_that_do_not_fit_are_left(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan_of(write_plan, {"one": 100, "two": 150, "three": 60}, hint=1)
    # 220 seconds of which 20 are kept free: 100 run, 100 are left.
    pool = FakePool(tmp_path / "out", seconds=1)
    outcome = run(file, pool, monkeypatch, 220)
    assert pool.started == ["one-seed0", "three-seed0"]
    assert (outcome.left, outcome.too_long) == (["two-seed0"], ["two-seed0"])
    # The next call has the time.
    outcome = run(file, pool, monkeypatch, 220)
    assert (outcome.finished, outcome.left) == (["two-seed0"], [])


def test_measured_steps_count_more_than_hints(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan_of(write_plan, {"one": 100, "two": 40, "three": 10}, hint=1)
    # Steps take twice as long as the hint: 40 of them do not fit into the 60 seconds left.
    pool = FakePool(tmp_path / "out", seconds=2)
    outcome = run(file, pool, monkeypatch, 280)
    assert pool.started == ["one-seed0", "three-seed0"]
    assert outcome.too_long == ["two-seed0"]


def test_a_cell_longer_than_the_whole_limit_is_begun(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan_of(write_plan, {"one": 1000, "two": 10}, hint=1)
    pool = FakePool(tmp_path / "out", seconds=1)
    run(file, pool, monkeypatch, 220)
    assert pool.started == ["one-seed0"]


def test_cells_wait_for_the_stages_that_they_share(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_plan({"suites": [], "seeds": [0, 1]})
    pool = FakePool(tmp_path / "out", seconds=1)
    outcome = run(file, pool, monkeypatch, 10_000, jobs=2)
    shared = "stage1+stage2"
    # Both trunks run side by side, and no cell begins before its own has ended.
    assert pool.started[:2] == [shared, shared]
    assert pool.started.count(shared) == 2
    assert sorted(outcome.finished) == sorted(pool.started[2:])
    assert len(outcome.finished) == 6
    assert outcome.left == []
