"""The Typer app: one line in COMMANDS for each subcommand."""

from __future__ import annotations

from importlib import import_module
from keyword import iskeyword
from typing import Annotated

import typer

import mmmamba_cli
from mmmamba_cli.cli.console import help_if_bare
from mmmamba_cli.plugins import entry_points

# A command `name` lives in cli/name.py, or name_.py if it is a word of Python's, which calls it
# `command`: a function, or a typer.Typer for a group of them. These modules are imported for
# --help, so each imports its library room inside the function that needs it.
# Other packages add theirs with entry points; so does ours with what is no part of the pipeline.
PLUGINS = "mmmamba.commands"
COMMANDS = (
    "seed",
    "distill",
    "hybridize",
    "eval",
    "chat",
    "profile",
    "report",
    "import",
    "export",
    "data",
    "status",
    "inspect",
    "doctor",
    "recipe",
)

# Plain help: brackets, as in stages[1].lr, are not markup, and rich need not be imported for it.
MARKUP = None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmmamba {mmmamba_cli.__version__}")
        raise typer.Exit


def _start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    help_if_bare(context)


def _module(name: str) -> str:
    return f"mmmamba_cli.cli.{name}_" if iskeyword(name) else f"mmmamba_cli.cli.{name}"


def build_app() -> typer.Typer:
    """The app with every command of COMMANDS."""
    built = typer.Typer(
        help=mmmamba_cli.__doc__.partition("\n")[0] if mmmamba_cli.__doc__ else None,
        rich_markup_mode=MARKUP,
        pretty_exceptions_enable=False,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    built.callback()(_start)
    ours = [(name, import_module(_module(name)).command) for name in COMMANDS]
    theirs = [(name, load()) for name, load in entry_points(PLUGINS) if name not in COMMANDS]
    for name, command in (*ours, *theirs):
        if isinstance(command, typer.Typer):
            built.add_typer(command, name=name)
        else:
            built.command(name)(command)
    return built


app = build_app()
