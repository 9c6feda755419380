"""The Typer app and its subcommands; the attribute `app` is built on first use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mmmamba_cli
from mmmamba_cli.cli import JSON_OPTION
from mmmamba_cli.cli.console import help_if_bare, print_json, print_text
from mmmamba_cli.errors import check_utf8
from mmmamba_cli.plugins import entry_points

# Commands whose files record the paths and words that they are given.
WRITING_COMMANDS = (
    *("seed", "distill", "hybridize", "import", "export"),
    *("eval", "ablate", "profile", "report", "scenes"),
)
# The list of commands in `mmmamba --help`, by purpose.
COMMAND_GROUPS = {
    "Make models": ("seed", "distill", "hybridize", "import", "export"),
    "Measure": ("eval", "ablate", "profile", "inspect", "verify", "doctor", "status"),
    "Report and chat": ("report", "chat"),
    "Data and recipes": ("data", "recipe", "scenes"),
}
PLUGIN_GROUP = "Commands of other packages"
FIRST_STEP = "Start with: mmmamba seed scenes-teacher"
# Command `name` is `command` in cli/name.py (name_.py for a Python keyword): a function, or a
# typer.Typer for a group. --help imports these modules, so they import the library inside the
# functions. Other packages add commands with entry points.
PLUGINS = "mmmamba.commands"
# Entry points of this project, listed beside its other commands.
OWN_PLUGINS = ("scenes",)
COMMANDS = tuple(
    name for names in COMMAND_GROUPS.values() for name in names if name not in OWN_PLUGINS
)

# Maximum width of help: longer lines are hard to read.
MAX_HELP_COLUMNS = 120
# Click's class of usage errors. Typer may vendor its own click, so the class is derived from one
# that typer exports: BadParameter < UsageError < ClickException.
UsageError: Any = typer.BadParameter.__mro__[2]

# Space between a command and its description.
COLUMN_GAP = 2

# Help is plain text: brackets, as in stages[1].lr, are not markup, and rich is not imported.
MARKUP = None


class GroupedCommands(TyperGroup):
    """The root command, whose help lists the commands by purpose and never cuts a description."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each of `COMMAND_GROUPS`, then one for commands of other packages."""
        shown = {
            name: command.get_short_help_str(limit=sys.maxsize)
            for name, command in self.commands.items()
            if not command.hidden
        }
        sections = {**COMMAND_GROUPS, PLUGIN_GROUP: tuple(sorted(shown.keys() - _grouped_names()))}
        width = max(map(len, shown))
        for title, names in sections.items():
            rows = [(name.ljust(width), shown[name]) for name in names if name in shown]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_spacing=COLUMN_GAP)


def _grouped_names() -> set[str]:
    return {name for names in COMMAND_GROUPS.values() for name in names}


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
    if context.invoked_subcommand in WRITING_COMMANDS:
        for word in (*sys.argv[1:], os.environ.get("MMMAMBA_RUN", "")):
            check_utf8(word)


def _module(name: str) -> str:
    return f"mmmamba_cli.cli.{name}_" if iskeyword(name) else f"mmmamba_cli.cli.{name}"


def build_app() -> typer.Typer:
    """Build the app with all commands of COMMANDS and PLUGINS."""
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
    """The commands that a command line needs; building all options would dominate the start-up.

    A line that starts with an option prints mmmamba's own help or version.
    """
    first = words[0] if words else "--help"
    if first in COMMANDS:
        return {first: _command(first)}
    commands = _all_commands()
    if first == "--" or not first.startswith("-"):
        return commands
    return {name: _without_options(command) for name, command in commands.items()}


def _without_options(command: Any) -> Callable[[], None]:
    """A command without its options, for the command list."""

    def listed() -> None:
        raise AssertionError("a listed command was run")

    listed.__doc__ = command.info.help if isinstance(command, typer.Typer) else command.__doc__
    return listed


def _app_of(commands: Mapping[str, Any]) -> typer.Typer:
    built = typer.Typer(
        cls=GroupedCommands,
        epilog=FIRST_STEP,
        help=mmmamba_cli.__doc__.partition("\n")[0] if mmmamba_cli.__doc__ else None,
        rich_markup_mode=MARKUP,
        pretty_exceptions_enable=False,
        invoke_without_command=True,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "max_content_width": MAX_HELP_COLUMNS,
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
    """Run the command that `sys.argv` names and return its exit code.

    A usage error is printed to stderr, with --json also to stdout. Errors of the command propagate.
    """
    try:
        code = command_line()(prog_name="mmmamba", standalone_mode=False)
    except UsageError as error:
        if JSON_OPTION in sys.argv[1:]:
            context = getattr(error, "ctx", None)
            path = "mmmamba" if context is None else context.command_path
            print_json({"error": error.format_message(), "hint": f"see `{path} --help`"})
        error.show()
        return int(error.exit_code)
    return code if isinstance(code, int) else 0


def command_line() -> Any:
    """The Click command for `sys.argv`; its help shows arguments without Python types."""
    completing = any(name.endswith("_COMPLETE") for name in os.environ)
    words = sys.argv[1:]
    command = typer.main.get_command(build_app() if completing else _app_of(_commands_for(words)))
    for one in _commands_below(command):
        for parameter in one.params:
            if parameter.param_type_name == "argument":
                # `CHECKPOINT` instead of `CHECKPOINT <path>`.
                parameter.display_type_rich = lambda ctx: None
    return command


def _commands_below(command: Any) -> Iterator[Any]:
    """The command and its subcommands, recursively."""
    yield command
    for one in getattr(command, "commands", {}).values():
        yield from _commands_below(one)


def __getattr__(name: str) -> Any:
    if name == "app":
        return build_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
