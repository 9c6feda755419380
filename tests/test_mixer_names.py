"""A mixer's name, title and class stand in the mixer's own files, its op and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmmamba_cli.architecture import mixer_specs
from mmmamba_cli.model.mixer import mixer_class

ROOT = Path(__file__).parents[1]
FOLDERS = ("mmmamba_cli", "evals")
# Folders of the mixers, and of ops and their cases, which have names of their own.
MIXERS = re.compile(r"mmmamba_cli/(architecture|model|inference)/mixers/")
OPS = re.compile(r"mmmamba_cli/(ops|doctor)/")
# Names that are words of the language: imports of their modules are found, not every mention.
WORDS = ("attention", "window")
# The vocabulary of the published layout.
EXCEPTIONS = {"mmmamba_cli/checkpoint/mmmamba_hf.py": "mamba2"}


def mentions(name: str, file: str, text: str) -> list[str]:
    """Lines of `text` that name the mixer, unless `file` is one of its own."""
    if re.search(rf"/mixers/{name}\.py$", file) or EXCEPTIONS.get(file) == name:
        return []
    patterns = [rf"mixers\.{name}\b", rf"mixers import .*\b{name}\b"]
    if name not in WORDS and not OPS.match(file):
        patterns += [rf"\b{mixer_class(name).__name__}\b", rf"\b{name}\b"]
        # A mixer may cite the equations of another.
        if not MIXERS.match(file):
            patterns.append(rf"\b{re.escape(mixer_specs()[name].title)}\b")
    found = re.compile("|".join(patterns), re.IGNORECASE)
    return [
        f"{file}:{i}: {line}" for i, line in enumerate(text.split("\n"), 1) if found.search(line)
    ]


@pytest.mark.parametrize("name", mixer_specs())
def test_a_name_stands_in_the_files_of_its_mixer_only(name: str) -> None:
    found = []
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix()
            found += mentions(name, path, file.read_text(encoding="utf-8"))
    assert not found


def test_mentions_are_found() -> None:
    def count(name: str, file: str, text: str) -> int:
        return len(mentions(name, f"mmmamba_cli/{file}", text))

    assert count("kda", "distill/a.py", 'if name == "kda":\n    KimiDelta\n# a kdas') == 2
    assert count("mamba2", "recipe/a.py", "as Mamba-2 does") == 1
    assert count("mamba2", "checkpoint/mmmamba_hf.py", "mamba2 layers") == 0
    assert count("gla", "ops/gla/__init__.py", "def gla(v: Tensor)") == 0
    assert count("gla", "ops/gla/__init__.py", "from mmmamba_cli.model.mixers.gla import X") == 1
    assert count("gated_delta", "model/mixers/kda.py", "as gated_delta") == 1
    assert (
        count("attention", "chat/a.py", "from mmmamba_cli.inference.mixers import attention") == 1
    )
    assert count("attention", "chat/a.py", "attention") == 0


def test_exceptions_are_needed() -> None:
    for file, name in EXCEPTIONS.items():
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8"))
