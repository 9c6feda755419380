"""--json prints user errors as JSON on stdout and as a sentence on stderr, with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from ended import Command

from mmmamba_cli.cli.app import build_app

GONE = "no-such-thing"
# Invalid arguments for every command with --json.
MISTAKES: dict[str, list[str]] = {
    "seed": [f"{GONE}.ckpt"],
    "distill": ["--run", GONE, "--data", f"{GONE}.jsonl"],
    "hybridize": ["--run", GONE, "--attn-layers", "1"],
    "eval": ["--suite", GONE, "--run", GONE],
    "chat": ["--run", GONE, "--prompt", "Hello"],
    "ablate": [f"{GONE}.yaml"],
    "profile": ["--run", GONE],
    "report": ["--run", GONE],
    "import": [GONE],
    "export": ["--run", GONE, "--format", "hub", "--out", "out"],
    "data check": [f"{GONE}.jsonl"],
    "data index": [f"{GONE}.jsonl"],
    "status": ["--run", GONE],
    "verify": [GONE],
    "inspect": ["--run", GONE],
    "doctor": ["--device", GONE],
    "recipe show": [GONE],
    "scenes build": ["--atlas", GONE, "--out", "out"],
    "scenes blind": ["--atlas", GONE],
}
# Commands without user errors, or whose result reports them.
WITHOUT = {"recipe list", "recipe validate"}


def commands_with_json() -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(name: str, command: Any) -> None:
        for below, one in getattr(command, "commands", {}).items():
            walk(f"{name} {below}".strip(), one)
        if any("--json" in parameter.opts for parameter in command.params):
            found[name] = command

    walk("", typer.main.get_command(build_app()))
    return found


def test_every_command_with_json_is_covered() -> None:
    assert set(commands_with_json()) == {*MISTAKES, *WITHOUT}


@pytest.mark.parametrize("name", MISTAKES)
def test_user_error_is_json(
    name: str, mmmamba: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mmmamba(*name.split(), *MISTAKES[name], "--json")
    assert done.code == 2, done.err
    found = json.loads(done.out)
    assert set(found) == {"error", "hint"}
    assert GONE in found["error"]
    said = found["error"] if found["hint"] is None else f"{found['error']} ({found['hint']})"
    assert done.err.splitlines()[-1] == f"error: {said}"
    # Without --json stdout is empty.
    plain = mmmamba(*name.split(), *MISTAKES[name])
    assert (plain.code, plain.out) == (2, "")
    assert plain.err.splitlines()[-1] == f"error: {said}"


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--nothing"],
        ["nothing"],
        ["eval"],
        ["data", "check", "a.jsonl", "--max-length", "x"],
        ["data", "check", "a.jsonl", "--max-bad-share", "2"],
        ["recipe", "show"],
        ["recipe", "nothing"],
    ],
)
def test_usage_error_is_json(words: list[str], mmmamba: Command) -> None:
    done = mmmamba(*words, "--json")
    assert done.code == 2
    found = json.loads(done.out)
    assert f"Error: {found['error']}" in done.err
    assert found["hint"].startswith("see `mmmamba")
    assert found["hint"].endswith(" --help`")


def test_os_error_is_json(
    mmmamba: Command, student_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "a.html")

    monkeypatch.setattr("mmmamba_cli.checkpoint.atomic_write_text", full)
    done = mmmamba("report", "--run", student_run, "--json")
    assert done.code == 2
    assert json.loads(done.out) == {
        "error": "a.html: the disk is full",
        "hint": "free some space or choose another folder",
    }
