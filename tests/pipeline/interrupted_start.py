"""`mmmamba` with a Ctrl-C while the processes of `--gpus` are started, or just afterwards.

The first argument is "during" or "after".
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing import util
from typing import Any

from mmmamba_cli.cli import main
from mmmamba_cli.distributed import launcher

_start_processes = launcher.start_processes
_spawnv_passfds = util.spawnv_passfds
_spawned: list[int] = []


def interrupt_after(*arguments: Any, **options: Any) -> Any:
    _start_processes(*arguments, **options)
    raise KeyboardInterrupt


def interrupt_during(*arguments: Any, **options: Any) -> Any:
    """The signal is received by another thread, since the main thread blocks it."""
    threading.Thread(target=_receive_interrupts, daemon=True).start()
    util.spawnv_passfds = _spawn
    return _start_processes(*arguments, **options)


def _receive_interrupts() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    time.sleep(3600)


def _spawn(*arguments: Any) -> int:
    """Interrupt the start of the last process before it has its arguments."""
    pid = _spawnv_passfds(*arguments)
    _spawned.append(pid)
    if len(_spawned) == 2:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    return pid


def run() -> None:
    launcher.start_processes = {"after": interrupt_after, "during": interrupt_during}[
        sys.argv.pop(1)
    ]
    main()
