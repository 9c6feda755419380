"""Session-wide materials, and the `case_of` fixture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from case import Case
from materials import Materials
from suite_tables import ScriptedModel

from mmmamba_cli import runs
from mmmamba_cli.cli import app as frame
from mmmamba_cli.evaluate import model_adapter
from mmmamba_cli.export import sidecar_files


def whole_command_line() -> Any:
    return typer.main.get_command(frame.build_app())


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """Speed up hundreds of cases: build the command line and bundled code once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame, "command_line", functools.cache(whole_command_line))
        bundle = functools.cache(sidecar_files.bundle_files)
        patch.setattr(sidecar_files, "bundle_files", bundle)
        yield


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return Materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture
def case_of(tmp_path: Path) -> Callable[[str, int], Case]:
    """`case_of("pickle", 17)` creates that case in its own folder."""
    return lambda kind, number: Case(kind, number, tmp_path)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every model by one that opens the picture and answers yes."""
    found = SimpleNamespace(name="student", origin="path")
    monkeypatch.setattr(runs, "resolve_path", lambda path: found)
    monkeypatch.setattr(
        model_adapter,
        "load_eval_model",
        lambda *words: ScriptedModel(lambda prompt: "Yes", name="student"),
    )
