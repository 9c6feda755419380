"""Which cells the runner starts, and which it leaves: a pool and a clock that are not real."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ablation_plans import WritePlan

from mmmamba_cli.ablation import Cell, CellRecord, estimates, expand, load_plan, unit_queue
from mmmamba_cli.ablation.cell_record import StageRecord, Timing, write_record
from mmmamba_cli.ablation.cells import SharedStages
from mmmamba_cli.ablation.estimates import Estimate, Estimator
from mmmamba_cli.ablation.plan_progress import Unit, find_progress
from mmmamba_cli.ablation.run_folders import RunState
from mmmamba_cli.ablation.runner import Outcome, RunnerEvents, UnitEnd, run_plan
from mmmamba_cli.ablation.unit_queue import TimeLimit, UnitQueue, is_worth_beginning

QUIET = RunnerEvents(lambda text: None, lambda done, total, left: None, lambda: False)


@dataclass
class FakePool:
    """Takes `seconds` for a step of a cell's own stages; the longest unit ends last.

    `tolerates` names the units that run out of memory beside more units than that.
    """

    out: Path
    seconds: float
    now: float = 0.0
    tolerates: dict[str, int] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    # Each unit started, with the number of units that run then and that share its memory.
    sharing: list[tuple[str, int, int]] = field(default_factory=list)
    units: list[tuple[float, Unit]] = field(default_factory=list)
    deadline: float | None = None
    devices: int = 1

    @property
    def running(self) -> Sequence[Unit]:
        return [unit for _, unit in self.units]

    def start(
        self, unit: Unit, parent: SharedStages | None, deadline: float | None, sharing: int
    ) -> None:
        name = "+".join(unit.stages) if isinstance(unit, SharedStages) else unit.name
        self.started.append(name)
        self.deadline = deadline
        assert unit.recipe is not None
        done = parent.stages if parent else ()
        steps = sum(s.steps for s in unit.recipe.stages if s.name not in done)
        self.units.append((self.now + steps * self.seconds, unit))
        self.sharing.append((name, len(self.units), sharing))

    def wait(self) -> list[UnitEnd]:
        for pair in self.units:
            beside = len(self.units) - 1
            name = "+".join(pair[1].stages) if isinstance(pair[1], SharedStages) else pair[1].name
            if beside > self.tolerates.get(name, beside):
                self.units.remove(pair)
                return [UnitEnd(pair[1], "out of memory", "step 0: no memory. More of it", beside)]
        self.units.sort(key=lambda pair: pair[0])
        end, unit = self.units.pop(0)
        if self.deadline is not None and end > self.deadline:
            self.now = self.deadline
            return [UnitEnd(unit, "stopped")]
        self.now = end
        if isinstance(unit, Cell):
            self.write(unit)
        return [UnitEnd(unit, "finished")]

    def write(self, unit: Cell) -> None:
        assert unit.recipe is not None
        steps = {stage.name: stage.steps for stage in unit.recipe.stages}
        stages = tuple(
            StageRecord(name=n, product=n, steps=k, tokens=0, samples=0, loss=None)
            for n, k in steps.items()
        )
        record = CellRecord(
            plan="plan",
            cell=unit.name,
            arm=unit.arm,
            seed=unit.seed,
            digest=unit.digest,
            status="finished",
            stages=stages,
            timing=Timing(
                date=str(self.now), stages={n: k * self.seconds for n, k in steps.items()}
            ),
        )
        write_record(self.out, unit, record)


def run(
    file: Path,
    pool: FakePool,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    jobs: int = 1,
    lines: list[str] | None = None,
) -> Outcome:
    plan = load_plan(file)
    cells = expand(plan)
    monkeypatch.setattr(unit_queue, "time", SimpleNamespace(monotonic=lambda: pool.now))
    say = QUIET.say if lines is None else lines.append
    return run_plan(
        plan,
        find_progress(pool.out, file.parent / "work", cells, cells, retry=False, overwrite=False),
        pool,
        out=pool.out,
        work=file.parent / "work",
        keep=(),
        jobs=jobs,
        limit=TimeLimit(seconds, pool.now),
        events=replace(QUIET, say=say),
    )


def plan_of(write_plan: WritePlan, steps: dict[str, int], hint: float, cell: float = 0) -> Path:
    arms = [
        {"name": name, "stages": ["stage1"], "set": {"stages.stage1.steps": count}}
        for name, count in steps.items()
    ]
    given = {"base": "one", "arms": arms, "suites": []}
    return write_plan({**given, "estimates": {"step": {"stage1": hint}, "cell": cell}})


def test_cells_that_end_in_time_come_first_and_another_is_begun(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan_of(write_plan, {"one": 100, "two": 150, "three": 60}, hint=1)
    # 220 seconds of which 20 are kept free: 100 and 60 run, and 40 of the other 150.
    pool = FakePool(tmp_path / "out", seconds=1)
    outcome = run(file, pool, monkeypatch, 220)
    assert pool.started == ["one-seed0", "three-seed0", "two-seed0"]
    assert (outcome.left, outcome.too_long) == (["two-seed0"], [])
    assert pool.now == 200
    outcome = run(file, pool, monkeypatch, 220)
    assert (outcome.finished, outcome.left) == (["two-seed0"], [])


def test_a_cell_is_not_begun_for_less_than_a_tenth_of_it(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan_of(write_plan, {"one": 160, "two": 401}, hint=1)
    # 40 seconds are left of 200.
    pool = FakePool(tmp_path / "out", seconds=1)
    outcome = run(file, pool, monkeypatch, 220)
    assert pool.started == ["one-seed0"]
    assert (outcome.left, outcome.too_long) == (["two-seed0"], ["two-seed0"])


def test_a_cell_that_is_begun_late_is_not_listed_as_too_long(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first cell shows that the estimates were too high.
    file = plan_of(write_plan, {"one": 20, "two": 3000}, hint=5, cell=145)
    pool = FakePool(tmp_path / "out", seconds=1)
    outcome = run(file, pool, monkeypatch, 220)
    assert pool.started == ["one-seed0", "two-seed0"]
    assert (outcome.left, outcome.too_long) == (["two-seed0"], [])


@pytest.mark.parametrize(
    ("estimate", "left", "expected"),
    [
        (None, 1, True),
        (Estimate(90, 10), 100, True),
        (Estimate(90, 10), 18, False),
        (Estimate(90, 10), 19, True),
        (Estimate(9000, 10), 129, False),
        (Estimate(9000, 10), 130, True),
        # What is left cannot be resumed.
        (Estimate(0, 500), 499, False),
    ],
)
def test_what_is_worth_beginning(estimate: Estimate | None, left: float, expected: bool) -> None:
    assert is_worth_beginning(estimate, left, 540) == expected


def test_half_of_a_short_limit_is_worth_beginning() -> None:
    assert is_worth_beginning(Estimate(9000, 10), 60, 100)
    assert not is_worth_beginning(Estimate(9000, 10), 59, 100)


def test_measured_steps_count_more_than_hints(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan_of(write_plan, {"one": 100, "two": 40, "three": 10}, hint=1)
    # Steps take twice as long as the hint: 40 of them do not fit into the 60 seconds left.
    pool = FakePool(tmp_path / "out", seconds=2)
    run(file, pool, monkeypatch, 280)
    assert pool.started == ["one-seed0", "three-seed0", "two-seed0"]


def test_a_call_begins_one_cell_however_long_it_is(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Loading takes longer than the limit.
    file = plan_of(write_plan, {"one": 10_000, "two": 10_001}, hint=1, cell=150)
    pool = FakePool(tmp_path / "out", seconds=1)
    outcome = run(file, pool, monkeypatch, 110, jobs=2)
    assert pool.started == ["one-seed0"]
    assert outcome.too_long == ["two-seed0"]


def test_runs_are_not_read_while_they_are_written(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may remove a file between the look at the folder and the reading."""
    pool = FakePool(tmp_path / "out", seconds=1)
    read: list[str] = []

    def read_run_state(folder: Path) -> RunState:
        assert folder.name not in [unit.folder for unit in pool.running]
        read.append(folder.name)
        return RunState()

    monkeypatch.setattr(estimates, "read_run_state", read_run_state)
    outcome = run(write_plan({"suites": [], "seeds": [0, 1]}), pool, monkeypatch, 10_000, jobs=3)
    assert len(outcome.finished) == 6
    # Before the first unit, and at the end of each: 6 cells and the stages shared in each seed.
    assert sorted(read) == sorted(2 * list(dict.fromkeys(read)))
    assert len(read) == 2 * 8


def test_cells_wait_for_the_stages_that_they_share(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_plan({"suites": [], "seeds": [0, 1]})
    pool = FakePool(tmp_path / "out", seconds=1)
    outcome = run(file, pool, monkeypatch, 10_000, jobs=2)
    shared = "stage1+stage2"
    # Both shared stages run side by side, and no cell begins before its own has ended.
    assert pool.started[:2] == [shared, shared]
    assert pool.started.count(shared) == 2
    assert sorted(outcome.finished) == sorted(pool.started[2:])
    assert len(outcome.finished) == 6
    assert outcome.left == []
    # A cell of each seed is the shared stages' only difference to its product.
    assert outcome.trained and set(outcome.trained).isdisjoint(outcome.finished)


# Cells with other numbers of steps share no stage.
SIX = {"one": 100, "two": 10, "three": 11, "four": 12, "five": 13, "six": 14}


def test_a_cell_out_of_memory_runs_again_beside_fewer(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan_of(write_plan, SIX, hint=1)
    pool = FakePool(tmp_path / "out", seconds=1, tolerates={"one-seed0": 1})
    lines: list[str] = []
    outcome = run(file, pool, monkeypatch, 10_000, jobs=4, lines=lines)
    assert len(outcome.finished) == 6
    assert (outcome.failed, outcome.left) == ({}, [])
    # The others go on meanwhile, and one cell at most runs beside it.
    assert pool.started == [*(f"{n}-seed0" for n in SIX), "one-seed0"]
    assert pool.sharing[0] == ("one-seed0", 1, 4)
    assert pool.sharing[-1] == ("one-seed0", 2, 2)
    assert lines == [
        "one-seed0 ran out of memory beside 3 others and runs again beside at most 1: "
        "step 0: no memory"
    ]


def test_a_cell_out_of_memory_runs_alone_before_it_fails(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan_of(write_plan, SIX, hint=1)
    pool = FakePool(tmp_path / "out", seconds=1, tolerates={"one-seed0": -1})
    lines: list[str] = []
    outcome = run(file, pool, monkeypatch, 10_000, jobs=4, lines=lines)
    tries = [running for name, running, _ in pool.sharing if name == "one-seed0"]
    assert tries == [1, 2, 1]
    assert len(outcome.finished) == 5
    message = "also alone on its device, step 0: no memory. More of it"
    assert outcome.failed == {"one-seed0": message}
    file = tmp_path / "out" / "one-seed0.json"
    assert lines[-1] == (
        f"one-seed0 failed: also alone on its device, step 0: no memory (whole message: {file})"
    )
    assert json.loads(file.read_text())["error"] == message


def test_shared_stages_out_of_memory_run_again(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_plan({"suites": [], "seeds": [0, 1]})
    pool = FakePool(tmp_path / "out", seconds=1, tolerates={"stage1+stage2": 0})
    outcome = run(file, pool, monkeypatch, 10_000, jobs=2)
    assert len(outcome.finished) == 6
    assert outcome.failed == {}


def test_no_other_cell_starts_beside_one_that_needs_the_memory(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    plan = load_plan(plan_of(write_plan, SIX, hint=1))
    cells = expand(plan)
    progress = find_progress(tmp_path, tmp_path, cells, cells, retry=False, overwrite=False)
    queue = UnitQueue(progress, Estimator(plan.estimates, work=tmp_path))
    first, second = queue.take(None, []), queue.take(None, [])
    assert first is not None and second is not None
    queue.put_back(first.unit, 2)
    # The others go first.
    assert queue.take(None, [second.unit]).unit.name == "three-seed0"  # type: ignore[union-attr]
    assert queue.take(None, [first.unit]).unit.name == "four-seed0"  # type: ignore[union-attr]
    assert queue.take(None, [first.unit, second.unit]) is None


def test_a_cell_out_of_memory_runs_if_no_other_can_in_the_time(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Too little time is left for "three", at first since the hint for loading counts.
    file = plan_of(write_plan, {"one": 60, "two": 95, "three": 5000}, hint=1, cell=95)
    pool = FakePool(tmp_path / "out", seconds=1, tolerates={"one-seed0": 0})
    outcome = run(file, pool, monkeypatch, 220, jobs=2)
    assert pool.started == ["one-seed0", "two-seed0", "one-seed0"]
    assert outcome.finished == ["two-seed0", "one-seed0"]


def test_a_cell_out_of_memory_is_left_when_the_time_is_over(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plan_of(write_plan, {"one": 100, "two": 300}, hint=1)
    pool = FakePool(tmp_path / "out", seconds=1, tolerates={"one-seed0": 0})
    outcome = run(file, pool, monkeypatch, 220, jobs=2)
    assert (outcome.left, outcome.failed) == (["one-seed0", "two-seed0"], {})
    assert outcome.out_of_memory == ["one-seed0"]
    assert not (tmp_path / "out" / "one-seed0.json").exists()
