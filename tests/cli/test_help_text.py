"""Help: its width, and a metavar for every value."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_lines import problem_of
from ended import Command

from mmmamba_cli.cli import app as frame

ROOT = Path(__file__).parents[2]
# Type names instead of a metavar.
TYPE_WORDS = re.compile(
    r"<|>|\b(TEXT|STR|STRING|INTEGER|INT|FLOAT|BOOLEAN|VALUE|RANGE|ANY)\b", re.I
)


def leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
        return
    for inner, one in below.items():
        yield from leaves(f"{name} {inner}".strip(), one)


def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str, bool]]:
    """Command, the help of a parameter, and whether the parameter takes a value."""
    monkeypatch.setattr(sys, "argv", ["mmmamba", "no-command"])
    for name, command in leaves("", frame.command_line()):
        context = command.make_context(name, [], resilient_parsing=True)
        for parameter in command.params:
            shown = parameter.get_help_record(context)
            takes = not getattr(parameter, "is_flag", False)
            if shown is not None:
                yield name, shown[0], takes


def test_every_value_has_a_metavar(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(records(monkeypatch))
    assert len(found) > 120
    for name, shown, takes in found:
        words = re.sub(r"--[\w-]+", "", shown.replace("FIELD=VALUE", "FIELD")).strip(" ,/")
        assert not TYPE_WORDS.search(words), (name, shown)
        assert bool(words) == takes, (name, shown)


def help_width(columns: int | None) -> int:
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    if columns is not None:
        environment["COLUMNS"] = str(columns)
    done = subprocess.run(
        [sys.executable, "-m", "mmmamba_cli", "data", "check", "--help"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return max(map(len, done.stdout.splitlines()))


def test_help_is_as_wide_as_the_terminal_up_to_a_limit() -> None:
    assert help_width(60) <= 60
    assert 80 < help_width(100) <= 100
    assert help_width(500) <= frame.MAX_HELP_COLUMNS
    assert help_width(500) == help_width(frame.MAX_HELP_COLUMNS)


def test_help_of_a_single_command_equals_that_of_the_whole_app(mmmamba: Command) -> None:
    """A command line builds only its own command; the help is the same."""
    whole = frame.build_app()
    listed = mmmamba("--help").out
    for name in frame.COMMANDS:
        assert f"\n  {name} " in listed
    assert {one.name for one in whole.registered_commands} <= set(listed.split())
    assert mmmamba("--help", "status").out == listed
    assert "Draw the run's lineage" in mmmamba("--", "status", "--help").out


def listed(help_text: str) -> dict[str, dict[str, str]]:
    """Description by command by section of a help."""
    sections: dict[str, dict[str, str]] = {}
    for part in help_text.split("\n\n"):
        title, *lines = part.splitlines()
        if title.endswith(":"):
            rows = [line.split(maxsplit=1) for line in lines]
            sections[title.removesuffix(":")] = {row[0]: row[1] for row in rows}
    return sections


@pytest.mark.parametrize("words", [(), ("data",), ("recipe",), ("scenes",)], ids=" ".join)
def test_descriptions_of_commands_fit_into_80_columns(
    words: tuple[str, ...], mmmamba: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = mmmamba(*words, "--help").out
    assert max(map(len, shown.splitlines())) <= 80
    assert "..." not in shown.partition("COMMAND [ARGS]...")[2]
    sections = listed(shown)
    del sections["Options"]
    for rows in sections.values():
        # A second line of a description would be a row of its own.
        assert all(text[0].isupper() and text.endswith(".") for text in rows.values()), rows


def test_commands_are_listed_by_purpose(mmmamba: Command) -> None:
    sections = listed(mmmamba("--help").out)
    for title, names in frame.COMMAND_GROUPS.items():
        assert tuple(sections[title]) == names
    assert frame.PLUGIN_GROUP not in sections
    first = frame.FIRST_STEP.partition(": mmmamba ")[2].split()
    assert problem_of(first) is None


def test_commands_of_other_packages_have_their_own_section(
    mmmamba: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paint() -> None:
        """Paint a layer."""

    ours = list(frame.entry_points(frame.PLUGINS))
    monkeypatch.setattr(frame, "entry_points", lambda group: [*ours, ("paint", lambda: paint)])
    assert listed(mmmamba("--help").out)[frame.PLUGIN_GROUP] == {"paint": "Paint a layer."}
