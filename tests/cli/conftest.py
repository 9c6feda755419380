"""Fixtures: a small run, built once per session and read-only."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ended import Command, Done
from small_models import language_model, run_with_a_student


@pytest.fixture(scope="session")
def student_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_with_a_student(tmp_path_factory.mktemp("everyday"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("models") / "small-llama")


@pytest.fixture
def chat(mmmamba: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run `mmmamba chat` with lines from a pipe, `chat("--model", path, typed="Hello\\n")`."""

    def run(*words: object, typed: str | bytes = "") -> Done:
        given = typed.encode() if isinstance(typed, str) else typed
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        return mmmamba("chat", *words)

    return run


@pytest.fixture
def complete(mmmamba: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The completions that bash offers at the end of a line."""

    def offered(line: str, **environment: str) -> list[str]:
        if "MMMAMBA_RUN" in os.environ:
            monkeypatch.delenv("MMMAMBA_RUN")
        asked = {
            "_MMMAMBA_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
            **environment,
        }
        for name, value in asked.items():
            monkeypatch.setenv(name, value)
        return mmmamba().out.split()

    return offered
