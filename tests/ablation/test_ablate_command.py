"""`mmmamba ablate` with a small random teacher: results, sharing, limits, failures, kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ablation_plans import WritePlan
from click.testing import Result
from preloaded_process import PreloadedProcess
from typer.testing import CliRunner

from mmmamba_cli.__main__ import main
from mmmamba_cli.ablation import execution
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import MmmambaError


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
        found[path.stem] = json.loads(path.read_text())
        del found[path.stem]["timing"]
    return found


@pytest.fixture(scope="module")
def trained() -> list[str]:
    """The stages that were trained, in order."""
    return []


@pytest.fixture(autouse=True)
def count_stages(monkeypatch: pytest.MonkeyPatch, trained: list[str]) -> None:
    trained.clear()
    original = execution.distill

    def distill(run: Any, recipe: Any, world: Any, callbacks: Any, **given: Any) -> Any:
        trained.extend(given["wanted"])
        return original(run, recipe, world, callbacks, **given)

    monkeypatch.setattr(execution, "distill", distill)


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
    assert isinstance(result.exception, MmmambaError)
    assert "2 cells failed: broken-seed0: the stages stage1, stage2" in str(result.exception)
    printed = json.loads(result.stdout[: result.stdout.rindex("}") + 1])
    assert printed["finished"] == ["linear-seed0", "last-seed0"]
    found = records(file)
    assert found["broken-seed0"]["status"] == "failed"
    assert "*.nothing" in found["broken-seed0"]["error"]
    # It stays failed, and is said again, until it is asked for.
    assert isinstance(ablate(file).exception, MmmambaError)
    file = write_plan({"arms": [*arms[:1], {**arms[1], "set": {}}, *arms[2:]], "suites": []})
    assert "other settings: broken-seed0, also-seed0" in str(ablate(file).exception)
    assert done(file, "--overwrite")["finished"] == ["broken-seed0", "also-seed0"]


def test_no_cell_is_begun_that_would_exceed_the_limit(
    write_plan: WritePlan, trained: list[str]
) -> None:
    arms = [
        {"name": "linear", "stages": ["stage1", "stage2"]},
        {"name": "long", "stages": ["stage1"], "set": {"stages.stage1.steps": 50}},
        {"name": "endless", "stages": ["stage1"], "set": {"stages.stage1.steps": 10000}},
    ]
    estimates = {"step": {"stage1": 10, "stage2": 0.01}, "cell": 1}
    file = write_plan({"arms": arms, "estimates": estimates, "suites": []})
    rows = {row["cell"]: row for row in done(file, "--dry-run")["cells"]}
    assert rows["linear-seed0"]["seconds"] == pytest.approx(1 + 4 * 10 + 4 * 0.01)
    assert rows["long-seed0"]["seconds"] == 1 + 50 * 10
    # 9 minutes of which 20 seconds are kept free: both short ones fit, then measured steps do.
    assert done(file, "--minutes", 9, "--only", "linear,long")["too_long"] == []
    # A cell is begun that no limit would allow, saved before its end, and gone on with.
    limited = done(file, "--minutes", 0.05, "--only", "endless")
    assert limited["left"] == ["endless-seed0"]
    work = next((file.parent / "work").glob("endless*"))
    (state,) = work.glob("training/stage1/step-*")
    first = int(state.name.removeprefix("step-"))
    assert 0 < first < 10000
    done(file, "--minutes", 0.05, "--only", "endless")
    (state,) = work.glob("training/stage1/step-*")
    assert int(state.name.removeprefix("step-")) > first


def test_a_killed_runner_gives_the_same_results(write_plan: WritePlan, tmp_path: Path) -> None:
    file = write_plan()
    done(file)
    whole = records(file)
    other = write_plan({"out": str(tmp_path / "killed" / "out")}, "plan2")
    folder = tmp_path / "killed"
    words = ["ablate", str(other), "--work", str(folder / "work"), "--device", "cpu"]
    places = (
        ("work/shared-*/training/stage2/step-*", 1),
        ("work/linear-*/products/linear-stage3", 1),
        ("work/hybrid-*/training/*/step-*", 1),
        ("out/*-seed0.json", 2),
    )
    for pattern, count in places:
        process = PreloadedProcess(main, words, tmp_path / "output")
        process.wait_for(lambda p=pattern, n=count: len(list(folder.glob(p))) >= n)  # type: ignore[misc]
        process.kill()
        process.wait()
    process = PreloadedProcess(main, words, tmp_path / "output")
    assert process.wait(120) == 0, process.text()
    resumed = {p.stem: json.loads(p.read_text()) for p in (folder / "out").glob("*.json")}
    for one in (*resumed.values(), *whole.values()):
        one.pop("timing", None)
        one["plan"] = ""
    assert resumed == whole
