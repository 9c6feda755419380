"""A thread that calls a function whenever nothing was printed for a while."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from mmmamba_cli.interrupts import is_importing

# Seconds between progress lines without a terminal.
PROGRESS_LINE_INTERVAL = 10.0
# Seconds until the first note about imports: they come first, when nothing was printed yet.
FIRST_IMPORT_NOTE = 2.0


class QuietTimer(AbstractContextManager["QuietTimer"]):
    """Call `on_quiet` whenever `interval` seconds pass without `reset`, the first time `first`.

    The thread runs inside the `with` block. The function runs in the thread; what it prints counts
    as a `reset`.
    """

    def __init__(self, on_quiet: Callable[[], None], interval: float, first: float | None = None):
        self._on_quiet = on_quiet
        self._interval = interval
        self._wait = interval if first is None else first
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quiet timer", daemon=True)

    def reset(self) -> None:
        """Something was printed: the interval begins again."""
        self._last = time.monotonic()

    def __enter__(self) -> QuietTimer:
        self.reset()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(max(0.0, self._last + self._wait - time.monotonic())):
            if time.monotonic() - self._last < self._wait:
                continue
            self._wait = self._interval
            self.reset()
            try:
                self._on_quiet()
            except (OSError, ValueError):
                # The stream is closed. The command reports that itself when it prints its result.
                return


@contextmanager
def time_notes(
    what: str, applies: Callable[[], bool] = lambda: True, first: float | None = None
) -> Iterator[None]:
    """Print `what, after 10 s` to stderr every PROGRESS_LINE_INTERVAL seconds of a long step.

    The first line comes after `first` seconds. Nothing is printed in a step that is short, or while
    `applies` returns False.
    """
    began = time.monotonic()

    def note() -> None:
        if applies() and sys.stderr is not None:
            sys.stderr.write(f"{what}, after {time.monotonic() - began:.0f} s\n")
            sys.stderr.flush()

    with QuietTimer(note, PROGRESS_LINE_INTERVAL, first):
        yield


@contextmanager
def import_notes() -> Iterator[None]:
    """`time_notes` while this thread imports: PyTorch takes seconds, on a busy machine many.

    Light commands, which do without PyTorch, note only imports that are as slow as other steps. Of
    several processes the first one prints.
    """
    thread, began = threading.get_ident(), time.monotonic()
    is_first_process = os.environ.get("RANK", "0") == "0"

    def applies() -> bool:
        is_early = time.monotonic() - began < PROGRESS_LINE_INTERVAL
        if not is_first_process or (is_early and "torch" not in sys.modules):
            return False
        return is_importing(sys._current_frames().get(thread))

    with time_notes("loading libraries", applies, min(FIRST_IMPORT_NOTE, PROGRESS_LINE_INTERVAL)):
        yield
