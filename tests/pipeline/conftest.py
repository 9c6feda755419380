"""A seeded run of a small teacher, with conversations to distill it on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conversations import write_conversations
from test_as_a_new_user import write_teacher
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.distill import stage_runner


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, conversations and a seeded run; copied by each test."""
    folder = tmp_path_factory.mktemp("seeded")
    write_teacher(folder)
    write_conversations(folder, 12)
    write_conversations(folder, 4, 1, "held_out")
    words = ("seed", folder / "hovle.ckpt", "--run", folder / "run", "--recipe", "smoke")
    result = CliRunner().invoke(app, [*map(str, words), "--no-report"])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def loss_plots() -> None:
    """Commands in this process plot their losses."""


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the time of a small stage is its plot; tests of plots ask for `loss_plots`."""
    if "loss_plots" not in request.fixturenames:
        monkeypatch.setattr(stage_runner, "plot_losses", lambda folder: None)


@pytest.fixture
def work(seeded: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(seeded / "run", folder / "run")
    return folder
