"""A thread that calls a function whenever nothing was printed for a while."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from mmmamba_cli.interrupts import is_importing

# Seconds between progress lines without a terminal.
PROGRESS_LINE_INTERVAL = 10.0


class QuietTimer(AbstractContextManager["QuietTimer"]):
    """Call `on_quiet` whenever `interval` seconds pass without `reset`.

    The thread runs inside the `with` block. The function runs in the thread; what it prints counts
    as a `reset`.
    """

    def __init__(self, on_quiet: Callable[[], None], interval: float):
        self._on_quiet = on_quiet
        self._interval = interval
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
        while not self._ended.wait(max(0.0, self._last + self._interval - time.monotonic())):
            if time.monotonic() - self._last < self._interval:
                continue
            self.reset()
            try:
                self._on_quiet()
            except (OSError, ValueError):
                # The stream is closed. The command reports that itself when it prints its result.
                return


@contextmanager
def time_notes(what: str, applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Print `what, after 10 s` to stderr every PROGRESS_LINE_INTERVAL seconds of a long step.

    Nothing is printed in a step that is short, or while `applies` returns False.
    """
    began = time.monotonic()

    def note() -> None:
        if applies() and sys.stderr is not None:
            sys.stderr.write(f"{what}, after {time.monotonic() - began:.0f} s\n")
            sys.stderr.flush()

    with QuietTimer(note, PROGRESS_LINE_INTERVAL):
        yield


@contextmanager
def import_notes() -> Iterator[None]:
    """`time_notes` while this thread imports: PyTorch may take long on a busy machine."""
    thread = threading.get_ident()

    def applies() -> bool:
        return is_importing(sys._current_frames().get(thread))

    with time_notes("loading libraries", applies):
        yield
