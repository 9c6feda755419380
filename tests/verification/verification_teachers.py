"""Folders of tiny teachers for tests of verification, and edits that break them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, save_teacher
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmmamba_cli.verification import CheckResult, VerificationReport, verify_teacher

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def teacher_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, written once and not to be changed."""

    def folder_of(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"teacher-{family}"
        if not folder.is_dir():
            folder.mkdir()
            save_teacher(FAMILIES[family], folder)
        return folder

    return folder_of


@pytest.fixture
def copied(teacher_folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's folder that a test may break."""
    return lambda family: Path(shutil.copytree(teacher_folders(family), tmp_path / family))


def edit_json(file: Path, **values: Any) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def verify(folder: Path, tokens: int = 2) -> VerificationReport:
    return verify_teacher(folder, device="cpu", tokens=tokens)


def result(report: VerificationReport, name: str) -> CheckResult:
    """The only result of that name."""
    (found,) = [check for check in report.checks if check.name == name]
    return found


def names_with(report: VerificationReport, status: str) -> list[str]:
    return [check.name for check in report.checks if check.status == status]
