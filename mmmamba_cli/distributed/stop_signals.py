"""Handling of SIGINT and SIGTERM: the first one stops after the step or batch, the second at
once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

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


def restore_handlers(before: Mapping[signal.Signals, Any], requests: StopSignalCounter) -> None:
    """Restore the signal handlers `before`, which do not receive copies of a request in `requests`.

    A copy may arrive after the work that the request stopped has been saved.
    """
    for number, handler in before.items():
        ignores = handler in (signal.SIG_IGN, None)
        signal.signal(number, handler if ignores else _without_copies(handler, requests))


def _without_copies(handler: Any, requests: StopSignalCounter) -> Any:
    """A handler that ignores copies of a request in `requests` and calls `handler` otherwise."""
    if not requests.count:
        return handler

    def handle(number: int, frame: FrameType | None) -> None:
        if not requests.is_repeat():
            return
        if callable(handler):
            handler(number, frame)
        else:
            signal.signal(number, handler)
            os.kill(os.getpid(), number)

    return handle


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
