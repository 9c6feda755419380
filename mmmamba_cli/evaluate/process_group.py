"""The processes of an evaluation: an interface of a few collectives, and a single process.

`mmmamba_cli.distributed.World` has these methods. It imports torch, which scoring does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mmmamba_cli.errors import DataError, MmmambaError

T = TypeVar("T")


class ProcessGroup(Protocol):
    """Processes that evaluate the same models on the same suites, each with its own model.

    All of them call the collectives in the same order. Process 0 is the main one.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    def all_gather(self, values: Sequence[T]) -> list[T]:
        """Concatenate the values of all processes in rank order. Values are pickled."""
        ...

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on process 0; every process gets its result, or raises its error."""
        ...


@dataclass(frozen=True)
class SingleProcess:
    """A group of one process."""

    rank: int = 0
    size: int = 1
    is_main: bool = True

    def all_gather(self, values: Sequence[T]) -> list[T]:
        return list(values)

    def run_on_main(self, work: Callable[[], T]) -> T:
        return work()


SINGLE_PROCESS = SingleProcess()


def run_on_all(group: ProcessGroup, work: Callable[[], T]) -> T:
    """Run `work` on every process at once, and return this process's own result.

    A `MmmambaError` of one process is raised on every process, so that none waits for it; only the
    process of the lowest rank that failed reports it. Other exceptions are raised where they occur.
    """
    if group.size == 1:
        return work()
    done: list[T] = []
    error: MmmambaError | None = None
    try:
        done.append(work())
    except MmmambaError as failed:
        error = failed
    errors = group.all_gather([error])
    first = next((rank for rank, one in enumerate(errors) if one is not None), None)
    if first is None:
        return done[0]
    raised = errors[first]
    assert raised is not None
    raised.is_reported_elsewhere = raised.is_reported_elsewhere or first != group.rank
    raise raised


def run_on_main_first(group: ProcessGroup, work: Callable[[], T]) -> T:
    """`run_on_all` in which process 0 finishes before the others begin: it may write files."""
    done: list[T] = []
    group.run_on_main(lambda: done.append(work()))
    return run_on_all(group, lambda: done[0] if group.is_main else work())


def require_equal(group: ProcessGroup, what: str, value: str) -> None:
    """Raise `DataError` on every process unless all have the same `value`."""
    values = group.all_gather([value])
    other = next((rank for rank, one in enumerate(values) if one != values[0]), None)
    if other is None:
        return
    error = DataError(
        f"process {other} has {what} other than process 0",
        "all processes read the same files: put them on a shared disk",
    )
    error.is_reported_elsewhere = not group.is_main
    raise error
