"""`mmmamba verify`: table, JSON and exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ended import Command
from verification_teachers import edit_tensors

from mmmamba_cli.architecture import mixer_specs
from mmmamba_cli.verification import student_checks

Folders = Callable[[str], Path]


@pytest.fixture(autouse=True)
def one_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"mamba2": mixer_specs()["mamba2"]}
    monkeypatch.setattr(student_checks, "mixer_specs", lambda: few)


def test_a_teacher_that_agrees(mmmamba: Command, teacher_folders: Folders) -> None:
    folder = teacher_folders("qwen3")
    done = mmmamba("verify", folder, "--device", "cpu", "--tokens", 2)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].strip() == f"{folder}, qwen3, in float32 on cpu"
    assert lines[1].split() == ["check", "result", "detail"]
    rows = {line.partition("  ")[0]: line.split("  ", 1)[1].split() for line in lines[3:-3]}
    assert rows["logits, text"][:4] == ["ok", "equal,", "bit", "for"]
    assert lines[-2].startswith("compared with Qwen3ForCausalLM of transformers ")
    assert lines[-1] == "agrees: no check found a difference"
    # Progress is on stderr, so that stdout is the result.
    assert "checking generation" in done.err


def test_a_difference_is_exit_code_2_in_words_and_json(mmmamba: Command, copied: Folders) -> None:
    folder = copied("qwen3")
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    done = mmmamba("verify", folder, "--device", "cpu")
    assert done.code == 2
    assert done.err.splitlines()[-1] == "error: tensors: missing: model.norm.weight"
    assert "not checked: stock class; logits, text" in done.out
    assert "agrees" not in done.out
    found = json.loads(mmmamba("verify", folder, "--device", "cpu", "--json").out)
    assert found["agrees"] is False
    assert found["checks"][0] == {
        "name": "tensors",
        "status": "different",
        "detail": "missing: model.norm.weight",
    }
    assert set(found) == {
        *("agrees", "teacher", "path", "model_type", "device", "dtype", "compared_with"),
        *("checks", "warnings"),
    }
