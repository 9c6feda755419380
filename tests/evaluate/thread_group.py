"""A process group whose processes are threads, which pickle what they exchange as processes do."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mmmamba_cli.errors import MmmambaError

T = TypeVar("T")


@dataclass
class Exchange:
    """What the threads of a group share. A barrier that is broken ends all threads."""

    size: int
    slots: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)
        self.slots = [b""] * self.size


@dataclass(frozen=True)
class ThreadGroup:
    """One thread's `ProcessGroup`."""

    rank: int
    size: int
    exchange: Exchange

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather(self, values: Sequence[T]) -> list[T]:
        self.exchange.slots[self.rank] = pickle.dumps(list(values))
        self.exchange.barrier.wait()
        found = [value for part in self.exchange.slots for value in pickle.loads(part)]
        self.exchange.barrier.wait()
        return found

    def run_on_main(self, work: Callable[[], T]) -> T:
        mine: list[Any] = []
        error = None
        if self.is_main:
            try:
                mine = [work()]
            except MmmambaError as failed:
                error = failed
        found = self.all_gather([(mine, error)])[0]
        if error is not None:
            raise error
        if found[1] is not None:
            found[1].is_reported_elsewhere = True
            raise found[1]
        return (mine or found[0])[0]


def run_in_group(size: int, work: Callable[[ThreadGroup], T]) -> list[T | BaseException]:
    """Run `work` in `size` threads; what each returned or raised. One that fails ends the others.

    Errors that all processes raise together do not break the barrier before the others get them.
    """
    exchange = Exchange(size)

    def one(rank: int) -> T | BaseException:
        try:
            return work(ThreadGroup(rank, size, exchange))
        except (MmmambaError, KeyboardInterrupt) as error:
            return error
        except BaseException as error:  # noqa: BLE001  (the caller gets it)
            exchange.barrier.abort()
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
