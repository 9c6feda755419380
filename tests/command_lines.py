"""What the command line itself says of the words of a command."""

from __future__ import annotations

import re
from typing import Any

import typer

from mmmamba_cli.cli.app import app

ROOT_COMMAND = typer.main.get_command(app)
# "..." stands for further words; brackets mark optional ones.
ELLIPSIS = "..."


def problem_of(words: list[str]) -> str | None:
    """Why the command line rejects these words after `mmmamba`, else None."""
    command, rest = found_command(words)
    if command is None:
        return f"there is no command {' '.join(words)}"
    if ELLIPSIS in rest:
        return unknown_options(command, rest)
    try:
        command.make_context("mmmamba", list(rest))
    except typer.Exit:
        # --help and --version exit.
        return None
    except Exception as error:  # noqa: BLE001  (any refusal: typer has its own copy of click's)
        return f"{type(error).__name__}: {error}"
    return None


def found_command(words: list[str]) -> tuple[Any, list[str]]:
    # `--` separates torchrun's options from those after it; the command line skips it.
    command, rest = ROOT_COMMAND, list(words[1:] if words[:1] == ["--"] else words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    # A page never means a group without a subcommand.
    whole = not hasattr(command, "commands") or rest[:1] in (["--help"], ["--version"])
    return (command if whole else None), rest


def unknown_options(command: Any, words: list[str]) -> str | None:
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    unknown = [w for w in words if re.match(r"--[a-z]", w) and w.partition("=")[0] not in known]
    return f"no option {', '.join(unknown)}" if unknown else None
