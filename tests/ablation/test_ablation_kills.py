"""`mmmamba ablate` that is killed at random writes ends with the JSON of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_points
from ablation_plans import WritePlan
from preloaded_process import PreloadedProcess
from test_ablate_command import done, without_times
from typer.testing import CliRunner

from mmmamba_cli.ablation import own_commands
from mmmamba_cli.cli.app import app

# Number of kills; use MMMAMBA_KILLS=10 for the full test.
KILLS = int(os.environ.get("MMMAMBA_KILLS", "2"))
# Writes between two kills; the run of a cell has more.
MAX_WRITES = 100
STAGE3 = (
    "distill --run {run} --recipe smoke --stage stage3 --data {folder}/train.jsonl "
    "--image-root {folder} --set data.max_length=400"
)
ARMS = [
    {"name": "linear"},
    {
        "name": "own",
        "stages": ["stage1", "stage2"],
        "commands": [
            "hybridize --run {run} --layers 1",
            STAGE3,
        ],
    },
]


def run_here(words: list[str], log: Path, should_stop: Callable[[], bool]) -> None:
    """A cell's own command, in this process: another one would import torch again."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (result.output, result.exception)


def ablate_again_and_again() -> None:
    """`kill_points.run` with commands of cells in the same process."""
    own_commands.run_mmmamba = run_here  # type: ignore[assignment]
    kill_points.run()


def records(folder: Path) -> dict[str, Any]:
    found = {
        path.stem: without_times(json.loads(path.read_text()))
        for path in sorted((folder / "out").glob("*.json"))
    }
    return {name: {**record, "plan": ""} for name, record in found.items()}


def test_random_kills_give_the_same_json(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(own_commands, "run_mmmamba", run_here)
    # A single seed trains no shared stages before the own command.
    done(write_plan({"arms": ARMS, "suites": []}))
    whole = records(tmp_path)
    assert len(whole) == 2 and {one["status"] for one in whole.values()} == {"finished"}
    folder = tmp_path / "killed"
    folder.mkdir()
    plan = write_plan({"arms": ARMS, "suites": [], "out": str(folder / "out")}, "killed")
    rng = random.Random(KILLS)
    places = [rng.randrange(1, MAX_WRITES) for _ in range(KILLS)]
    # After the product of an own command, and before the note that it is done.
    places += [["open", "/.commands.json.partial", 1]] * 2
    words = ["ablate", str(plan), "--work", str(folder / "work"), "--device", "cpu"]
    spec = {"words": words, "folder": str(folder), "kills": places}
    report = tmp_path / "report"
    arguments = [json.dumps(spec), str(report)]
    process = PreloadedProcess(ablate_again_and_again, arguments, tmp_path / "output")
    assert process.wait(300) == 0, process.text()
    starts = [json.loads(line) for line in report.read_text().splitlines()]
    assert starts[-1].get("exit") == 0, (starts, process.text())
    # Many kills may let the run end before its last places.
    noted = [start for start in starts if "commands.json" in start.get("killed", "")]
    assert len(noted) == 2 or KILLS > 2
    assert records(folder) == whole
    assert not list(folder.rglob(".*partial-*"))
