"""`mmmamba ablate` with a small random teacher: results, sharing, limits, failures, kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from ablation_plans import PLAN, WritePlan
from click.testing import Result
from preloaded_process import PreloadedProcess
from typer.testing import CliRunner

from mmmamba_cli.__main__ import main
from mmmamba_cli.ablation import cell_executor, own_commands, pools
from mmmamba_cli.ablation.preparation import folder_lock
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import DeviceMemoryError, MmmambaError, RunError


def ablate(file: Path, *words: object) -> Result:
    given = ["ablate", file, "--work", file.parent / "work", "--device", "cpu", *words]
    return CliRunner().invoke(app, [str(word) for word in given])


def done(file: Path, *words: object) -> dict[str, Any]:
    """The JSON that a successful command prints."""
    result = ablate(file, *words, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def records(file: Path) -> dict[str, Any]:
    """The JSON of all cells, without what differs between equal runs."""
    found = {}
    for path in sorted((file.parent / "out").glob("*.json")):
        found[path.stem] = without_times(json.loads(path.read_text()))
    return found


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs between equal runs."""
    del record["timing"]
    for stage in record.get("stages", ()):
        del stage["tokens_per_second"]
    return record


@pytest.fixture(scope="module")
def trained() -> list[str]:
    """The stages that were trained, in order."""
    return []


@pytest.fixture(autouse=True)
def count_stages(monkeypatch: pytest.MonkeyPatch, trained: list[str]) -> None:
    trained.clear()
    original = cell_executor.distill

    def distill(run: Any, recipe: Any, world: Any, callbacks: Any, **given: Any) -> Any:
        trained.extend(given["wanted"])
        return original(run, recipe, world, callbacks, **given)

    monkeypatch.setattr(cell_executor, "distill", distill)


def test_cells_are_run_once_and_share_their_stages(
    write_plan: WritePlan, trained: list[str]
) -> None:
    file = write_plan()
    names = ["teacher", "linear-seed0", "hybrid-seed0", "early-seed0"]
    assert done(file)["finished"] == names
    assert trained == ["stage1", "stage2", "stage3", "stage3"]
    found = records(file)
    assert list(found) == sorted(names)
    linear, hybrid, early = (found[name] for name in names[1:])
    assert [stage["steps"] for stage in linear["stages"]] == [4, 4, 4]
    assert [point["step"] for point in linear["stages"][2]["held_out"]] == [2, 4]
    assert linear["model"]["parent"][1] == early["model"]["content_hash"]
    assert hybrid["model"]["attention_layers"] == [0]
    assert linear["stages"][:2] == hybrid["stages"][:2] == early["stages"]
    suite = linear["suites"][0]
    assert suite["asked"] == len(suite["correct"]) == len(suite["answers"]["places"]) == 12
    right = suite["correct"].count("1")
    assert suite["rules"][0]["metrics"]["mean"] == pytest.approx(100 * right / 12)
    # Runs are small: the evaluated product is left, and nothing of the shared stages.
    runs = {path.name.rpartition("-")[0]: path for path in (file.parent / "work").iterdir()}
    assert sorted(runs) == sorted(names[1:])
    assert [path.name for path in (runs["linear-seed0"] / "products").iterdir()] == [
        "linear-stage3"
    ]
    assert not (runs["linear-seed0"] / "training").exists()
    again = done(file)
    assert (again["finished"], again["left"]) == ([], [])
    assert len(trained) == 4


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(write_plan: WritePlan) -> None:
    arms = [
        {"name": "linear", "stages": ["stage1"]},
        {"name": "broken", "set": {"stages.stage1.learns": ["*.nothing"]}},
        {"name": "also", "parent": "broken", "set": {"layers.attention": 1}},
        {"name": "last", "stages": []},
    ]
    file = write_plan({"arms": arms, "suites": []})
    result = ablate(file, "--json")
    assert result.exit_code == 2
    printed = json.loads(result.stdout)
    assert "2 cells failed: broken-seed0: the stages stage1, stage2" in printed["error"]
    assert printed["finished"] == ["linear-seed0", "last-seed0"]
    found = records(file)
    assert found["broken-seed0"]["status"] == "failed"
    assert "*.nothing" in found["broken-seed0"]["error"]
    assert str(file.parent / "out" / "CELL.json") in printed["hint"]
    # It stays failed, and is said again, until it is asked for.
    assert isinstance(ablate(file).exception, MmmambaError)
    file = write_plan({"arms": [*arms[:1], {**arms[1], "set": {}}, *arms[2:]], "suites": []})
    assert "other settings: broken-seed0, also-seed0" in str(ablate(file).exception)
    assert done(file, "--overwrite")["finished"] == ["broken-seed0", "also-seed0"]


def without_states(read_text: Callable[..., str]) -> Callable[..., str]:
    def read(path: Path, *given: Any, **named: Any) -> str:
        if path.name == "state.json":
            raise FileNotFoundError(path)
        return read_text(path, *given, **named)

    return read


def test_a_cell_that_no_limit_allows_is_saved_and_gone_on_with(
    write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [{"name": "endless", "stages": ["stage1"], "set": {"stages.stage1.steps": 10000}}]
    estimates = {"step": {"stage1": 10}, "cell": 1}
    file = write_plan({"base": "endless", "arms": arms, "estimates": estimates, "suites": []})
    (row,) = done(file, "--dry-run")["cells"]
    assert row["seconds"] == 1 + 10000 * 10
    limited = done(file, "--minutes", 0.01)
    assert limited["left"] == ["endless-seed0"]
    work = next((file.parent / "work").glob("endless*"))
    (state,) = work.glob("training/stage1/step-*")
    first = int(state.name.removeprefix("step-"))
    assert 0 < first < 10000
    # The steps that are done are subtracted, and their own speed counts, not the hint.
    seconds = json.loads((state / "state.json").read_text())["progress"]["seconds"]
    (row,) = done(file, "--dry-run")["cells"]
    assert row["seconds"] == pytest.approx(1 + (10000 - first) * seconds / first)
    # A process of a killed runner may remove a state that was just found.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", without_states(Path.read_text))
        (row,) = done(file, "--dry-run")["cells"]
    assert row["seconds"] == 1 + 10000 * 10
    done(file, "--minutes", 0.02)
    (state,) = work.glob("training/stage1/step-*")
    assert int(state.name.removeprefix("step-")) > first


def test_cells_side_by_side_give_the_same_results(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command starts new interpreters; forks of this one import nothing again.
    monkeypatch.setattr(pools, "get_context", lambda method: get_context("fork"))
    file = write_plan({"suites": []})
    done(file, "--only", "linear,hybrid", "--jobs", 2)
    two = records(file)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "work")
    done(file, "--only", "linear,hybrid")
    assert records(file) == two
    assert list(two) == ["hybrid-seed0", "linear-seed0"]


def test_a_process_that_dies_costs_its_cell_only(
    write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "get_context", lambda method: get_context("fork"))
    original = pools.run_unit

    def run_unit(executor: Any, unit: Any, parent: Any, control: Any) -> Any:
        if unit.name == "dies-seed0":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(executor, unit, parent, control)

    monkeypatch.setattr(pools, "run_unit", run_unit)
    arms = [{"name": name, "stages": []} for name in ("linear", "dies", "last")]
    file = write_plan({"arms": arms, "suites": []})
    with pytest.raises(MmmambaError, match="1 cells failed: dies-seed0: its process ended"):
        raise ablate(file, "--jobs", 2).exception or AssertionError("no error")
    assert {name: one["status"] for name, one in records(file).items()} == {
        "linear-seed0": "finished",
        "dies-seed0": "failed",
        "last-seed0": "finished",
    }


def test_a_cell_out_of_memory_beside_others_runs_alone(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "get_context", lambda method: get_context("fork"))
    original = cell_executor.CellExecutor.run_cell
    tried = tmp_path / "tried"

    def run_cell(self: Any, cell: Any, parent: Any, control: Any) -> Any:
        if cell.name == "large-seed0":
            tried.write_text(tried.read_text() + "x" if tried.exists() else "x")
            if control.memory_share < 1:
                raise DeviceMemoryError("stage s ran out of device memory: 1 GiB. Allocator: ...")
        return original(self, cell, parent, control)

    monkeypatch.setattr(cell_executor.CellExecutor, "run_cell", run_cell)
    arms = [{"name": name, "stages": []} for name in ("large", "linear", "last")]
    result = ablate(write_plan({"base": "last", "arms": arms, "suites": []}), "--jobs", 2)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "3 cells finished, 0 cells left" in result.output
    assert (
        "large-seed0 ran out of memory beside another and runs again alone on its device: stage "
        "s ran out of device memory: 1 GiB\n"
    ) in result.output
    assert tried.read_text() == "xx"


def test_chosen_layers_and_own_commands(
    write_plan: WritePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selection takes the place of a placement; own commands run after the stages."""
    run: list[list[str]] = []

    def run_mmmamba(words: list[str], log: Path, should_stop: object) -> None:
        run.append(words)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output

    monkeypatch.setattr(own_commands, "run_mmmamba", run_mmmamba)
    early = {"stages": ["stage1", "stage2"]}
    arms = [
        {"name": "chosen", "set": {"layers.attention": 1, "layers.select": "mse"}},
        {"name": "own", **early, "commands": ["hybridize --run {run} --layers 2"]},
    ]
    file = write_plan({"base": "own", "arms": arms, "suites": []})
    done(file)
    found = records(file)
    chosen = found["chosen-seed0"]["model"]
    assert chosen["product"] == "hybrid-1-mse-stage3"
    assert len(chosen["attention_layers"]) == 1
    assert found["own-seed0"]["model"]["attention_layers"] == [2]
    assert [words[0] for words in run] == ["hybridize"]
    assert found["own-seed0"]["commands"][-1] == "mmmamba hybridize --run RUN --layers 2"


def test_a_suite_that_the_plan_gains(write_plan: WritePlan, trained: list[str]) -> None:
    """Finished cells are evaluated on it alone; one whose product is gone keeps its result."""
    arms = [{"name": name, "stages": []} for name in ("linear", "gone", "broken")]
    suites = json.loads(json.dumps(PLAN["suites"]))
    file = write_plan({"arms": arms, "suites": suites})
    done(file)
    before = records(file)
    work = file.parent / "work"
    shutil.rmtree(next(work.glob("gone-*")))
    weights = next(work.glob("broken-*")) / "products" / "seed" / "config.json"
    suites[0]["answers"] = ["generated", "likelihood"]
    file = write_plan({"arms": arms, "suites": suites})
    rows = done(file, "--dry-run")["cells"]
    states = {row["cell"]: row["state"] for row in rows}
    assert states == {
        "teacher": "to complete",
        "linear-seed0": "to complete",
        "gone-seed0": "lacks suites",
        "broken-seed0": "to complete",
    }
    weights.write_text("{}")
    result = ablate(file, "--json")
    printed = json.loads(result.stdout)
    assert "1 cells failed: broken-seed0" in printed["error"]
    assert printed["finished"] == ["teacher", "linear-seed0"]
    assert printed["lacking"] == {"gone-seed0": ["scenes-likelihood"]}
    assert trained == []
    after = records(file)
    for name in ("gone-seed0", "broken-seed0"):
        assert after[name] == before[name]
    for name in ("teacher", "linear-seed0"):
        generated, likelihood = after[name]["suites"]
        assert [generated] == before[name]["suites"]
        assert likelihood["label"] == "scenes-likelihood"
        assert likelihood["settings"]["answers"] == "chosen by likelihood"
        assert likelihood["later"]["device"] == "CPU"
        assert after[name]["commands"][-1].endswith("--suite scenes --answers likelihood")


def test_times_of_a_suite_are_those_of_all_its_answers(write_plan: WritePlan) -> None:
    file = write_plan({"arms": [{"name": "linear", "stages": []}]})
    record = file.parent / "out" / "linear-seed0.json"
    times = []
    for _ in range(2):
        done(file, "--only", "linear")
        times.append(json.loads(record.read_text())["timing"]["suites"])
        # The answers are kept in the run.
        record.unlink()
    assert list(times[0]) == ["scenes"]
    assert times[1] == {}


def test_two_runners_cannot_use_one_folder(write_plan: WritePlan) -> None:
    file = write_plan()
    with (
        folder_lock(file.parent / "out"),
        pytest.raises(RunError, match="is in use by another mmmamba ablate"),
    ):
        raise ablate(file).exception or AssertionError("no error")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "nowhere.jsonl"}, "the plan's data nowhere.jsonl does not exist"),
        ({"suites": ["scene"]}, "no suite is called scene"),
        (
            {"suites": [{"name": "scenes", "data": "nowhere"}]},
            "SCENES.tsv, which is not in nowhere",
        ),
    ],
)
def test_material_is_checked_before_the_first_cell(
    changes: dict[str, Any], words: str, write_plan: WritePlan
) -> None:
    file = write_plan(changes)
    assert words in str(ablate(file).exception)
    assert records(file) == {}


def test_a_killed_runner_gives_the_same_results(write_plan: WritePlan, tmp_path: Path) -> None:
    # Scoring rules of scenes take seconds to import; answers are kept by tests of `eval`.
    arms = [{"name": "linear"}, {"name": "hybrid", "set": {"layers.attention": 1}}]
    file = write_plan({"suites": [], "arms": arms})
    done(file)
    whole = records(file)
    other = write_plan(
        {"suites": [], "arms": arms, "out": str(tmp_path / "killed" / "out")}, "plan2"
    )
    folder = tmp_path / "killed"
    words = ["ablate", str(other), "--work", str(folder / "work"), "--device", "cpu"]
    places = (
        ("work/shared-*/training/stage2/step-*", 1),
        ("out/*-seed0.json", 1),
    )
    for pattern, count in places:
        process = PreloadedProcess(main, words, tmp_path / "output")
        process.wait_for(lambda p=pattern, n=count: len(list(folder.glob(p))) >= n)  # type: ignore[misc]
        process.kill()
        process.wait()
    process = PreloadedProcess(main, words, tmp_path / "output")
    assert process.wait(120) == 0, process.text()
    resumed = {
        p.stem: without_times(json.loads(p.read_text())) for p in (folder / "out").glob("*.json")
    }
    for one in (*resumed.values(), *whole.values()):
        one["plan"] = ""
    assert resumed == whole
