"""Console output: tables, errors, JSON, progress. Results go to stdout, the rest to stderr.

rich is imported on first use, which keeps --help fast.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TextIO

import typer

from mmmamba_cli.cli.quiet_timer import PROGRESS_LINE_INTERVAL, QuietTimer
from mmmamba_cli.errors import MmmambaWarning

if TYPE_CHECKING:
    from rich.console import Console

# Seconds between updates of the time left beside a bar.
BAR_UPDATE_INTERVAL = 1.0
# Table width without a terminal.
UNLIMITED_COLUMNS = 100_000
# Longer words are truncated; no path or name is that long.
MAX_WORD_LENGTH = 1000
# Shown warnings of one category: thousands of pictures may have the same problem.
MAX_WARNINGS = 5
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD_LENGTH + 1},}}")


@cache
def out() -> Console:
    """The rich console on stdout, for results."""
    from rich.console import Console

    return Console()


@cache
def err() -> Console:
    """The rich console on stderr, for progress, warnings and errors."""
    from rich.console import Console

    return Console(stderr=True)


def print_error(message: str) -> None:
    """Print `error: ...` to stderr, without wrapping or markup."""
    _print_prefixed("error", "bold red", message)


def print_warning(message: str) -> None:
    """Print `warning: ...` to stderr, without wrapping or markup."""
    _print_prefixed("warning", "bold yellow", message)


def warn_not_final(name: str) -> None:
    """Warn about a product that was never distilled end to end."""
    print_warning(f"{name} was never distilled end to end; its answers will be poor")


def _print_prefixed(prefix: str, style: str, message: str) -> None:
    from rich.text import Text

    for line in message.splitlines():
        err().print(Text.assemble((f"{prefix}:", style), " ", escape_control(line)), soft_wrap=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings of mmmamba as `warning: ...`, without the source line.

    Only the first `MAX_WARNINGS` of a category are shown, then a note that there are more. Warnings
    of other packages keep Python's format.
    """
    shown: Counter[type[Warning]] = Counter()
    with warnings.catch_warnings():
        default_showwarning = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, MmmambaWarning):
                default_showwarning(message, category, filename, lineno, file, line)
                return
            shown[category] += 1
            if shown[category] <= MAX_WARNINGS:
                print_warning(str(message))
            elif shown[category] == MAX_WARNINGS + 1:
                print_warning("there are more such warnings, which are not shown")

        warnings.showwarning = show
        yield


def escape_control(text: str) -> str:
    """Escape control characters and truncate very long words.

    Names and values from foreign files may hold either.
    """
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )
    return _LONG_WORD.sub(lambda word: f"{word[0][:MAX_WORD_LENGTH]}...", shown)


def print_line(text: str, style: str | None = None, to_stderr: bool = False) -> None:
    """Print a line without markup, wrapped at words in a terminal and unwrapped elsewhere."""
    console = err() if to_stderr else out()
    unwrapped = not console.is_terminal
    console.print(
        text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=unwrapped
    )


def print_json(value: Any) -> None:
    """Print `value` as JSON to stdout; NaN and infinities become null.

    If stdout cannot encode a character, all non-ASCII characters are escaped.
    """
    finite = _finite(value)
    text = json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(finite, indent=2, allow_nan=False)
    print_text(text)


def print_text(text: str = "") -> None:
    """Print `text` and a newline to stdout."""
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
    """Print a table; `right` names the right-aligned columns, None cells show as `-`.

    In a terminal, cells wrap to its width; elsewhere every row is one line without trailing blanks.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = err() if to_stderr else out()
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for column in columns:
        # Fold long cells instead of truncating them.
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else escape_control(str(cell))) for cell in row))
    if console.is_terminal:
        console.print(table)
        return
    plain = Console(width=UNLIMITED_COLUMNS, file=io.StringIO())
    with plain.capture() as captured:
        plain.print(table)
    text = "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())
    stream = sys.stderr if to_stderr else sys.stdout
    if stream is not None:
        stream.write(text)


def help_if_bare(context: typer.Context) -> None:
    """Print the help of a command group and exit 0 if no subcommand was given."""
    if context.invoked_subcommand is None:
        print_text(context.get_help())
        raise typer.Exit


@contextmanager
def if_interrupted(sentence: str | Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C inside the block, print `sentence`; the interrupt propagates."""
    try:
        yield
    except KeyboardInterrupt:
        text = sentence if isinstance(sentence, str) else sentence()
        print_line(f"interrupted: {text}", to_stderr=True)
        raise


@contextmanager
def progress(
    what: str,
    total: int | None = None,
    unit: str = "",
    clock: Callable[[], float] = time.monotonic,
    time_left: Callable[[], float] | None = None,
) -> Iterator[Callable[[int], None]]:
    """Show the progress of a step on stderr; yields a function that adds to the number done.

    A terminal shows a bar. Elsewhere lines `what: 12/236 unit` are printed at the start, at the
    end, and between them every PROGRESS_LINE_INTERVAL seconds, by a thread if the step itself has
    nothing to add. Without `total` they show the time only. `time_left` gives the seconds left;
    the default extrapolates from the number done.
    """
    if err().is_terminal and not err().is_dumb_terminal:
        with _bar(what, total, unit, time_left) as advance:
            yield advance
    else:
        with _plain_lines(what, total, unit, clock, time_left) as advance:
            yield advance


def approximate_time(seconds: float) -> str:
    """Seconds as `about 45 s` or `about 2.5 minutes`; not more exact than an estimate is."""
    if seconds < 97.5:
        return f"about {round(seconds) if seconds < 20 else 5 * round(seconds / 5)} s"
    minutes = seconds / 60
    return f"about {round(2 * minutes) / 2 if minutes < 10 else round(minutes):g} minutes"


@contextmanager
def _bar(
    what: str, total: int | None, unit: str, time_left: Callable[[], float] | None
) -> Iterator[Callable[[int], None]]:
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    if total is not None:
        columns += [MofNCompleteColumn(), TextColumn(escape(unit))]
    columns.append(TimeElapsedColumn())
    if time_left is not None:
        columns.append(TextColumn("{task.fields[left]}"))
    elif total is not None:
        columns.append(TimeRemainingColumn())
    # rich would move what is printed to stdout to its own stream, even if stdout is a file.
    to_terminal = sys.stdout is not None and sys.stdout.isatty()
    with Progress(*columns, console=err(), redirect_stdout=to_terminal) as bar:
        task = bar.add_task(escape(what), total=total, left="")

        def show_left() -> None:
            if time_left is not None:
                bar.update(task, left=f"{approximate_time(time_left())} left")

        def advance(more: int) -> None:
            bar.advance(task, more)
            show_left()

        show_left()
        with QuietTimer(show_left, BAR_UPDATE_INTERVAL):
            yield advance


@contextmanager
def _plain_lines(
    what: str,
    total: int | None,
    unit: str,
    clock: Callable[[], float],
    time_left: Callable[[], float] | None,
) -> Iterator[Callable[[int], None]]:
    done = printed = 0
    began = last_time = clock()
    # The thread of the timer and that of the step print.
    lock = threading.Lock()

    def print_progress(between: bool) -> None:
        nonlocal printed, last_time
        with lock:
            printed, last_time = done, clock()
            text = what if total is None else f"{what}: {done}/{total}{f' {unit}' if unit else ''}"
            if between:
                text += _time_note(last_time - began, done, total, time_left)
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
        timer.reset()

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if clock() - last_time >= PROGRESS_LINE_INTERVAL:
            print_progress(between=True)

    timer = QuietTimer(lambda: print_progress(between=True), PROGRESS_LINE_INTERVAL)
    print_progress(between=False)
    try:
        with timer:
            yield advance
    finally:
        if done != printed:
            print_progress(between=False)


def _time_note(
    seconds: float, done: int, total: int | None, time_left: Callable[[], float] | None
) -> str:
    """`, after 12 s`, and the time left if it is known."""
    note = f", after {seconds:.0f} s"
    if time_left is not None:
        return f"{note}, {approximate_time(time_left())} left"
    if total is None or not 0 < done < total:
        return note
    return f"{note}, {approximate_time(seconds / done * (total - done))} left"
