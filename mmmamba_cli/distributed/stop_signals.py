"""Handling of SIGINT and SIGTERM: the first one stops after the step or batch, the second at
once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A process may receive one request twice: schedulers signal every process of a job, and launchers
# forward the signal to their processes.
SAME_REQUEST_SECONDS = 1.0


def stopping_message(unit: str) -> str:
    """The message of the first signal; the process stops after this `unit` of its work."""
    return f"\nstopping after this {unit}; press Ctrl-C again to stop at once\n"


class StopSignalCounter:
    """Counts stop signals, and distinguishes a second request from a copy of the first."""

    def __init__(self) -> None:
        self.count = 0
        self._first = 0.0

    def is_repeat(self) -> bool:
        """Count a signal; return whether it is a second request to stop."""
        self.count += 1
        if self.count == 1:
            self._first = time.monotonic()
        return time.monotonic() - self._first > SAME_REQUEST_SECONDS


def write_from_handler(text: str) -> None:
    """Write to stderr from a signal handler.

    A handler may interrupt a write of `sys.stderr`, whose buffer is not reentrant (`RuntimeError`).
    """
    try:
        os.write(sys.stderr.fileno(), text.encode())
    except (AttributeError, OSError, ValueError):
        # stderr has no file descriptor, for example in a test that captures it, or is closed.
        sys.stderr.write(text)


def exit_by_signal(number: int) -> NoReturn:
    """Exit with the code of a process that the signal ended: 130 for SIGINT, 143 for SIGTERM.

    Raises an exception, so that context managers remove incomplete files.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def skip_interpreter_shutdown() -> Callable[[], None]:
    """Skip Python's shutdown when this process ends; returns a function to call on success.

    A gloo thread that releases a tensor during the shutdown aborts the process. Call it early: exit
    handlers run in reverse order, and this one must run last.
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
