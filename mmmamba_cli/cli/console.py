"""What commands print: tables, errors, JSON, progress. Results go to stdout, the rest to stderr.

rich is imported when something is first printed with it, so that --help need not wait for it.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TextIO

import typer

from mmmamba_cli.errors import MmmambaWarning

if TYPE_CHECKING:
    from rich.console import Console

# Seconds between lines of progress where there is no terminal to redraw.
PLAIN_INTERVAL = 10.0
# Columns of a table that no terminal limits.
UNBROKEN = 100_000
# No path and no name needs more letters in one word.
LONGEST_WORD = 1000
# Warnings of one kind that are shown: thousands of pictures may have the same oddity.
SHOWN_WARNINGS = 5
LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


@cache
def out() -> Console:
    """The console of results, on stdout."""
    from rich.console import Console

    return Console()


@cache
def err() -> Console:
    """The console of progress, warnings and errors, on stderr."""
    from rich.console import Console

    return Console(stderr=True)


def print_error(message: str) -> None:
    """`error: ...` on stderr, each line of the message unbroken and free of markup."""
    _print_marked("error", "bold red", message)


def print_warning(message: str) -> None:
    """`warning: ...` on stderr, likewise."""
    _print_marked("warning", "bold yellow", message)


def warn_not_final(name: str) -> None:
    """Warn of a product that has not been through the last stage."""
    print_warning(f"{name} was not distilled end to end; its answers will be poor")


def _print_marked(mark: str, style: str, message: str) -> None:
    from rich.text import Text

    for line in message.splitlines():
        err().print(Text.assemble((f"{mark}:", style), " ", visible(line)), soft_wrap=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings of the project as `warning: ...`, without the place in the code.

    Of one kind the first `SHOWN_WARNINGS` are shown, and that there are more. Warnings of others
    look as Python writes them.
    """
    shown: Counter[type[Warning]] = Counter()
    with warnings.catch_warnings():
        as_python_does = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, MmmambaWarning):
                as_python_does(message, category, filename, lineno, file, line)
                return
            shown[category] += 1
            if shown[category] <= SHOWN_WARNINGS:
                print_warning(str(message))
            elif shown[category] == SHOWN_WARNINGS + 1:
                print_warning("there are more such warnings, which are not shown")

        warnings.showwarning = show
        yield


def visible(text: str) -> str:
    """`text` as a terminal may have it: what it would obey is escaped, endless words are cut.

    Names and values out of foreign files come this way.
    """
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )
    return LONG_WORD.sub(lambda word: f"{word[0][:LONGEST_WORD]}...", shown)


def print_line(text: str, style: str | None = None, to_stderr: bool = False) -> None:
    """A line on stdout, or stderr, as it is: broken between words in a terminal, else nowhere."""
    console = err() if to_stderr else out()
    whole = not console.is_terminal
    console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=whole)


def print_json(value: Any) -> None:
    """`value` as JSON on stdout; null for NaN and infinities, which JSON does not have.

    Where stdout cannot encode a letter, all that are not ASCII are escaped as JSON escapes them.
    """
    known = _finite(value)
    text = json.dumps(known, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(known, indent=2, allow_nan=False)
    print_text(text)


def print_text(text: str = "") -> None:
    """`text` and the end of a line on stdout, in the encoding that stdout has."""
    if sys.stdout is not None:
        sys.stdout.write(f"{text}\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str | None = None,
    right: Collection[str] = (),
    to_stderr: bool = False,
) -> None:
    """A table on stdout, or stderr; `right` names the columns that are aligned right.

    None shows as `-`. Fits a terminal by wrapping cells; elsewhere every row is one line, whatever
    its length.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = err() if to_stderr else out()
    if not console.is_terminal:
        console = Console(width=UNBROKEN, stderr=to_stderr)
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for column in columns:
        # Folded where it is too long for a line: names are not to be cut short.
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else visible(str(cell))) for cell in row))
    console.print(table)


def help_if_bare(context: typer.Context) -> None:
    """For the callback of a group: print its help and exit 0 if no command was given."""
    if context.invoked_subcommand is None:
        print_text(context.get_help())
        raise typer.Exit


@contextmanager
def if_interrupted(sentence: str | Callable[[], str]) -> Iterator[None]:
    """Where Ctrl-C ends what is inside: say what is left of it and how to go on.

    The interrupt goes on to end the command with 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        said = sentence if isinstance(sentence, str) else sentence()
        print_line(f"interrupted: {said}", to_stderr=True)
        raise


@contextmanager
def progress(
    what: str,
    total: int,
    unit: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Progress of one long step on stderr; yields a function that takes how many more are done.

    A bar in a terminal. Elsewhere plain lines, `what: 12/236 unit`: the first at once, the others
    at least PLAIN_INTERVAL seconds apart, the last when the step ends.
    """
    if err().is_terminal:
        with _bar(what, total, unit) as advance:
            yield advance
    else:
        with _plain_lines(what, total, unit, clock) as advance:
            yield advance


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(escape(unit)),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err()) as bar:
        task = bar.add_task(escape(what), total=total)
        yield lambda more: bar.advance(task, more)


@contextmanager
def _plain_lines(
    what: str, total: int, unit: str, clock: Callable[[], float]
) -> Iterator[Callable[[int], None]]:
    done = said = 0
    last_time = clock()

    def say() -> None:
        nonlocal said, last_time
        said, last_time = done, clock()
        sys.stderr.write(f"{what}: {done}/{total}{f' {unit}' if unit else ''}\n")
        sys.stderr.flush()

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if clock() - last_time >= PLAIN_INTERVAL:
            say()

    say()
    try:
        yield advance
    finally:
        if done != said:
            say()
