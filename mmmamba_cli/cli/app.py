"""The Typer app: one line in COMMANDS for each subcommand.

`app` is the whole app, built when it is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Annotated, Any

import typer

import mmmamba_cli
from mmmamba_cli.cli import JSON_OPTION
from mmmamba_cli.cli.console import help_if_bare, print_json, print_text
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

# Columns of help in a terminal that has as many or more; longer lines are hard to read.
HELP_COLUMNS = 120
# Mistakes in the words of a line. typer may bring its own copy of click, so the class is taken
# from one that typer itself names: BadParameter < UsageError < ClickException.
LineError: Any = typer.BadParameter.__mro__[2]

# Plain help: brackets, as in stages[1].lr, are not markup, and rich need not be imported for it.
MARKUP = None


def _print_version(wanted: bool) -> None:
    if wanted:
        print_text(f"mmmamba {mmmamba_cli.__version__}")
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
    """The app with every command of COMMANDS and of PLUGINS."""
    return _app_of(_all_commands())


def _all_commands() -> dict[str, Any]:
    found = {name: _command(name) for name in COMMANDS}
    for name, load in entry_points(PLUGINS):
        if name not in found:
            found[name] = load()
    return found


def _command(name: str) -> Any:
    return import_module(_module(name)).command


def _commands_for(words: Sequence[str]) -> dict[str, Any]:
    """The commands that a line needs: building the options of all takes longer than the rest.

    A line that begins with an option of mmmamba itself shows its help or version, and ends.
    """
    first = words[0] if words else "--help"
    if first in COMMANDS:
        return {first: _command(first)}
    commands = _all_commands()
    if first == "--" or not first.startswith("-"):
        return commands
    return {name: _named_only(command) for name, command in commands.items()}


def _named_only(command: Any) -> Callable[[], None]:
    """A command without its options, for the list of commands."""

    def shown() -> None:
        raise AssertionError("a list of commands was run")

    shown.__doc__ = command.info.help if isinstance(command, typer.Typer) else command.__doc__
    return shown


def _app_of(commands: Mapping[str, Any]) -> typer.Typer:
    built = typer.Typer(
        help=mmmamba_cli.__doc__.partition("\n")[0] if mmmamba_cli.__doc__ else None,
        rich_markup_mode=MARKUP,
        pretty_exceptions_enable=False,
        invoke_without_command=True,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "max_content_width": HELP_COLUMNS,
        },
    )
    built.callback()(_start)
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            built.add_typer(command, name=name)
        else:
            built.command(name)(command)
    return built


def run() -> int:
    """Run the command that `sys.argv` names; returns its exit code.

    A mistake in the words of the line is said on stderr with the usage, and with --json on stdout
    too. Raises what the command raises.
    """
    try:
        code = command_line()(prog_name="mmmamba", standalone_mode=False)
    except LineError as error:
        if JSON_OPTION in sys.argv[1:]:
            context = getattr(error, "ctx", None)
            path = "mmmamba" if context is None else context.command_path
            print_json({"error": error.format_message(), "hint": f"see `{path} --help`"})
        error.show()
        return int(error.exit_code)
    return code if isinstance(code, int) else 0


def command_line() -> Any:
    """What `sys.argv` needs of the app, as a command of click.

    Its help gives arguments without Python's types.
    """
    completing = any(name.endswith("_COMPLETE") for name in os.environ)
    words = sys.argv[1:]
    command = typer.main.get_command(build_app() if completing else _app_of(_commands_for(words)))
    for one in _commands_below(command):
        for parameter in one.params:
            if parameter.param_type_name == "argument":
                # `CHECKPOINT`, where typer would write `CHECKPOINT <path>`.
                parameter.display_type_rich = lambda ctx: None
    return command


def _commands_below(command: Any) -> Iterator[Any]:
    yield command
    for one in getattr(command, "commands", {}).values():
        yield from _commands_below(one)


def __getattr__(name: str) -> Any:
    if name == "app":
        return build_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
