"""Installed packages that do not match: one sentence instead of a traceback."""

from __future__ import annotations

import json
from typing import NoReturn

import pytest
from ended import Command

from mmmamba_cli import versions
from mmmamba_cli.cli import app
from mmmamba_cli.doctor import diagnosis

INSTALLED = {"torch": "2.13.0+cpu", "torchvision": "0.20.1"}
SENTENCE = (
    "torchvision 0.20.1 does not match torch 2.13.0+cpu: operator torchvision::nms does not exist "
    f"({versions.TORCHVISION_REMEDY})"
)


def broken_import(*names: object) -> NoReturn:
    """What transformers raises where torchvision's operators were built for another torch."""
    try:
        raise RuntimeError("operator torchvision::nms does not exist")
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module 'Qwen3VLProcessor'") from error


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", INSTALLED.get)


def test_torchvision_of_another_torch_is_named(
    mmmamba: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "run", broken_import)
    done = mmmamba("verify", "teacher", "--json")
    assert (done.code, done.err) == (2, f"error: {SENTENCE}\n")
    assert json.loads(done.out)["hint"] == versions.TORCHVISION_REMEDY


def test_other_errors_of_libraries_keep_their_traceback(
    mmmamba: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> NoReturn:
        raise RuntimeError("operator aten::nms does not exist")

    monkeypatch.setattr(app, "run", fail)
    with pytest.raises(RuntimeError, match="aten::nms"):
        mmmamba("verify", "teacher")


def test_doctor_names_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "__import__", broken_import, raising=False)
    assert SENTENCE.replace("torchvision ", "torchvision: ", 1) in diagnosis.diagnose().failures
