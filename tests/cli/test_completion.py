"""Shell completion: its candidates and its speed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmmamba_cli.recipe import recipe_names

HEAVY = ("torch", "transformers", "numpy", "safetensors", "PIL")
Complete = Callable[..., list[str]]


def test_completion_is_fast(student_run: Path) -> None:
    """Completion imports neither torch nor transformers."""
    code = (
        "import os, sys\nfrom mmmamba_cli.cli import main\nsys.argv = ['mmmamba']\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    os.environ |= {'COMP_WORDS': line, 'COMP_CWORD': str(len(line.split(' ')) - 1)}\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        f"assert not [m for m in {HEAVY} if m in sys.modules], list(sys.modules)\n"
    )
    lines = ("--from ", "--compare "), ("",), ("--recipe ",)
    asked = [
        f"mmmamba {command} --run {student_run} {words}"
        for command, several in zip(("chat", "inspect", "distill"), lines, strict=True)
        for words in several
    ]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "_MMMAMBA_COMPLETE": "complete_bash"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["seed", "seed", "teacher", "seed", "teacher", *recipe_names()]


@pytest.mark.parametrize("command", ["chat", "distill", "hybridize", "export", "eval", "profile"])
def test_completion_of_products(complete: Complete, student_run: Path, command: str) -> None:
    assert complete(f"mmmamba {command} --run {student_run} --from ") == ["seed"]
    assert complete(f"mmmamba {command} --from s", MMMAMBA_RUN=str(student_run)) == ["seed"]
    assert complete(f"mmmamba {command} --run {student_run} --from x") == []


def test_completion_of_the_teacher(complete: Complete, student_run: Path) -> None:
    assert complete(f"mmmamba chat --run {student_run} --compare ") == ["seed", "teacher"]
    assert complete(f"mmmamba inspect --run {student_run} t") == ["teacher"]


def test_incomplete_products_are_not_completed(complete: Complete, tmp_path: Path) -> None:
    (tmp_path / "products" / ".seed.partial").mkdir(parents=True)
    (tmp_path / "products" / "empty").mkdir()
    assert complete(f"mmmamba chat --run {tmp_path} --from ") == []
    assert complete(f"mmmamba chat --run {tmp_path}/nowhere --from ") == []


@pytest.mark.parametrize(
    "words", ["recipe show", "recipe validate", "seed x --recipe", "distill --recipe"]
)
def test_completion_of_recipes(complete: Complete, words: str) -> None:
    assert complete(f"mmmamba {words} ") == recipe_names()
    assert complete(f"mmmamba {words} smok") == ["smoke"]


def test_completion_of_commands(complete: Complete) -> None:
    assert complete("mmmamba do") == ["doctor"]


def test_completion_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmmamba_cli", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert done.returncode == 0
    assert "_MMMAMBA_COMPLETE=complete_bash" in done.stdout
