"""Signals that ask a command to stop: the first politely, the second at once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Schedulers signal every process of a job, and launchers pass the signal on to theirs: one request
# arrives twice.
SAME_REQUEST_SECONDS = 1.0


class StopSignalCounter:
    """Tells a second request from a second copy of the first."""

    def __init__(self) -> None:
        self.count = 0
        self._first = 0.0

    def is_repeat(self) -> bool:
        """Count a signal that has arrived; whether it is a second request to stop."""
        self.count += 1
        if self.count == 1:
            self._first = time.monotonic()
        return time.monotonic() - self._first > SAME_REQUEST_SECONDS


def write_from_handler(text: str) -> None:
    """Write to stderr from a signal handler.

    `sys.stderr` may be in the middle of a write, which a handler cannot enter (`RuntimeError`).
    """
    try:
        os.write(sys.stderr.fileno(), text.encode())
    except (AttributeError, OSError, ValueError):
        # stderr is no file, as where a test captures it, or it is closed.
        sys.stderr.write(text)


def exit_by_signal(number: int) -> NoReturn:
    """End as a shell reports a process that the signal ended: 130 for SIGINT, 143 for SIGTERM.

    What is half-written is cleared away on the way.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def skip_interpreter_shutdown() -> Callable[[], None]:
    """Let this process end without Python's shutdown; returns a function to call on success.

    A thread of gloo that releases a tensor during the shutdown aborts the process. To be called
    early: exit handlers run in reverse order, and the one registered here must be the last.
    """
    done = False

    def succeed() -> None:
        nonlocal done
        done = True

    def end() -> None:
        if done:
            os._exit(0)

    atexit.register(end)
    return succeed
