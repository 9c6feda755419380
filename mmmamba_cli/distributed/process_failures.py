"""Failures of launched processes: their errors, the cause of all, and whether one was killed."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mmmamba_cli.errors import MmmambaError, RunError

# Limit of a traceback: the queue between the processes holds 64 KiB.
MAX_TRACE_CHARACTERS = 3000


class ProcessKilled(RunError):
    """A signal ended a process, and the run had not been asked to stop."""


@dataclass(frozen=True)
class ProcessFailure:
    """The exception that ended a process, as plain values: some exceptions cannot be pickled."""

    time: float
    rank: int
    kind: str
    text: str
    hint: str | None
    trace: str
    is_user_error: bool
    # Whether the process only lost its connection to one that had ended before.
    is_lost_connection: bool
    # Arguments of an OSError.
    os_error: tuple[int | None, str | None, str | None] | None

    def exception(self) -> BaseException:
        """The exception that the launching process raises."""
        if self.is_user_error:
            return MmmambaError(self.text, self.hint)
        error = (
            OSError(*self.os_error) if self.os_error else RuntimeError(f"{self.kind}: {self.text}")
        )
        error.add_note(f"in process {self.rank}:\n{self.trace}")
        return error


def process_failure(error: BaseException) -> ProcessFailure:
    """The failure of this process."""
    os_error = None
    if isinstance(error, OSError):
        name = error.filename
        os_error = (error.errno, error.strerror, None if name is None else str(name))
    mistake = error if isinstance(error, MmmambaError) else None
    text = (str(error) if mistake is None else mistake.message)[:MAX_TRACE_CHARACTERS]
    return ProcessFailure(
        time=time.time(),
        rank=int(os.environ["RANK"]),
        kind=type(error).__name__,
        text=text,
        hint=None if mistake is None else mistake.hint,
        trace=traceback.format_exc()[-MAX_TRACE_CHARACTERS:],
        is_user_error=mistake is not None,
        is_lost_connection=isinstance(error, dist.DistError) or "gloo" in text.lower(),
        os_error=os_error,
    )


def root_cause(failures: list[ProcessFailure], exits: dict[int, Any]) -> BaseException:
    """The exception to raise for failed processes: the first that no other one caused."""
    first = min(
        failures, key=lambda failure: (failure.is_lost_connection, failure.time), default=None
    )
    if first is None or first.is_lost_connection:
        named = [f"process {rank} by {x.signal_name()}" for rank, x in exits.items()]
        killed = any(x.exitcode < 0 for x in exits.values())
        return ProcessKilled(
            f"a process of this run was killed{f': {named[0]}' if killed else ''}",
            "often because main memory ran out; the same command goes on from the last state",
        )
    return first.exception()


def was_killed(pids: Iterable[int]) -> bool:
    """Whether a signal has ended one of these child processes. Does not reap them."""
    # Python has no waitid on macOS before 3.13.
    return hasattr(os, "waitid") and any(_ended_by_signal(pid) for pid in pids)


def _ended_by_signal(pid: int) -> bool:
    try:
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        # Reaped meanwhile.
        return False
    return end is not None and end.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
