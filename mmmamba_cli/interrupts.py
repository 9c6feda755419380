"""Ctrl-C as exit code 130 without a traceback, from the first import to the end of the process.

This module imports little, since a Ctrl-C before `handle_interrupts` is not handled.
"""

import os
import signal
import sys
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from sys import UnraisableHookArgs
    from types import FrameType
    from typing import NoReturn

INTERRUPTED = 130
# Delay before an interrupt that could not leave a callback is raised again.
RERAISE_DELAY_SECONDS = 0.01
_IMPORT_SYSTEM = "<frozen importlib._bootstrap"


def handle_interrupts() -> None:
    """Handle SIGINT in the main process of a command; an ignored SIGINT stays ignored.

    During an import the process exits at once, since importing code may treat a KeyboardInterrupt
    as a missing package. Afterwards KeyboardInterrupt is raised, so that files are cleaned up. A
    forked child exits at once.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    main_process = os.getpid()

    def interrupt(number: int, frame: "FrameType | None") -> None:
        if os.getpid() != main_process or is_importing(frame):
            exit_interrupted()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = _reraise_interrupt


def exit_on_interrupt() -> None:
    """Exit at once on SIGINT from now on; called at the end of a command."""
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, lambda number, frame: exit_interrupted())


@contextmanager
def block_interrupts() -> "Iterator[None]":
    """Block SIGINT, and in processes started in this context until `unblock_interrupts`.

    Ctrl-C reaches every process of a terminal. Workers started in this context do not receive it,
    even while they import; the main process ends them. A pending SIGINT is delivered afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_interrupts() -> None:
    """Unblock SIGINT in a process started under `block_interrupts`.

    Raises `KeyboardInterrupt` if one is pending.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def exit_interrupted() -> "NoReturn":
    """End the process with exit code 130, without handlers that could print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, RuntimeError, ValueError):
            # The reader is gone, the stream is closed, or a write was in progress.
            continue
    os._exit(INTERRUPTED)


def is_interrupted(error: BaseException | None) -> bool:
    """Whether an exception is a KeyboardInterrupt or was raised while one was handled."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def is_importing(frame: "FrameType | None") -> bool:
    """Whether `frame` or one of its callers is executing an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORT_SYSTEM):
            return True
        frame = frame.f_back
    return False


def _reraise_interrupt(failure: "UnraisableHookArgs") -> None:
    """Raise an interrupt again that a finaliser or callback could not propagate."""
    if not issubclass(failure.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(failure)
        return
    import threading

    again = threading.Timer(RERAISE_DELAY_SECONDS, _interrupt_main_thread)
    again.daemon = True
    again.start()


def _interrupt_main_thread() -> None:
    import _thread
    import threading

    # A signal to the thread interrupts its wait for a file, a lock or a timer.
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
    else:
        _thread.interrupt_main()
