"""A plan of a small random teacher, with data and a suite of twelve questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablation_plans import PLAN, WritePlan, suite_rows
from conversations import write_conversations
from suite_tables import write_tsv
from test_as_a_new_user import write_teacher

from mmmamba_cli.distill import stage_runner


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, conversations and a suite's table."""
    folder = tmp_path_factory.mktemp("material")
    write_teacher(folder, 1, 2)
    write_conversations(folder, 6)
    write_conversations(folder, 2, 1, "held_out")
    write_tsv(folder / "SCENES.tsv", suite_rows())
    return folder


@pytest.fixture
def write_plan(material: Path, tmp_path: Path) -> WritePlan:
    """Writes PLAN with changes of its top-level keys, results and work below `tmp_path`."""

    def write(changes: Mapping[str, Any] | None = None, name: str = "plan") -> Path:
        tree = {**PLAN, "out": str(tmp_path / "out"), **(changes or {})}
        text = json.dumps(tree).replace("{folder}", str(material))
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(json.loads(text), sort_keys=False))
        return file

    return write


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_runner, "plot_losses", lambda folder: None)
