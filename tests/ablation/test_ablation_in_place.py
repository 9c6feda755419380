"""`mmmamba ablate` with a teacher of transformers, whose students have mixers in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ablation_plans import WritePlan
from families import FAMILIES, save_teacher
from test_ablate_command import ablate, count_stages, done, records, trained

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.runs import Run

__all__ = ["count_stages", "trained"]

STEPS = {f"stages.stage{number}.steps": 1 for number in (1, 2, 3)}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("idefics3", "gemma3"):
        save_teacher(FAMILIES[name], folder / name)
    return folder


def plan(teachers: Path, name: str, **changes: Any) -> dict[str, Any]:
    settings = {"layers.attention": 0, "data.max_length": 400, **STEPS}
    return {"teacher": str(teachers / name), "set": settings, **changes}


def test_cells_share_their_stages_and_are_evaluated(
    write_plan: WritePlan, teachers: Path, trained: list[str]
) -> None:
    arms = [
        {"name": "hybrid", "stages": ["stage1", "stage3"], "set": {"layers.attention": 1}},
        {"name": "early", "stages": ["stage1"]},
    ]
    file = write_plan(plan(teachers, "idefics3", arms=arms, base="hybrid"))
    assert done(file)["finished"] == ["teacher", "hybrid-seed0", "early-seed0"]
    # Stage 1 is that of both arms.
    assert trained == ["stage1", "stage3"]
    found = records(file)
    kinds = {name: record["model"]["kind"] for name, record in found.items()}
    expected = {"early-seed0": "linear", "hybrid-seed0": "hybrid (1 attention)"}
    assert kinds == {**expected, "teacher": "teacher"}
    for name, record in found.items():
        (suite,) = record["suites"]
        assert (suite["asked"], suite["not_asked"]) == (12, 0)
        # Its processor has a resolution of its own.
        assert suite["settings"]["max_tiles"] is None
        stages = [stage["name"] for stage in record["stages"]]
        count = {"teacher": 0, "early-seed0": 1}.get(name, 2)
        assert stages == ["stage1", "stage3"][:count]
        assert all(stage["steps"] == 1 for stage in record["stages"])
    (folder,) = (file.parent / "work").glob("hybrid-seed0-*")
    assert Run(folder).is_in_place
    assert done(file)["finished"] == []


def test_image_tokens_in_both_directions(write_plan: WritePlan, teachers: Path) -> None:
    arms = [{"name": "linear", "stages": []}]
    given = plan(teachers, "gemma3", arms=arms, suites=[])
    file = write_plan(given)
    assert isinstance(ablate(file).exception, MmmambaError)
    failed = json.loads((file.parent / "out" / "linear-seed0.json").read_text())
    assert "allow_bidirectional: true in the plan" in failed["error"]
    file = write_plan({**given, "allow_bidirectional": True})
    assert done(file, "--retry")["finished"] == ["linear-seed0"]
    (record,) = records(file).values()
    assert record["commands"][0].endswith(" --allow-bidirectional")
