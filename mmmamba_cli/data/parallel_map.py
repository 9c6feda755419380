"""A function in worker processes, its results in order: torch's `DataLoader` and its signals."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.interrupts import block_interrupts

ResultT = TypeVar("ResultT")


def map_in_workers(
    function: Callable[[int], ResultT],
    numbers: Sequence[int],
    workers: int,
    pin_memory: bool = False,
) -> Iterator[ResultT]:
    """Yield `function` of each number, in order; `workers` processes compute ahead.

    With no workers or one number, this process computes. A `MmmambaError` of `function` is raised
    here as it was; another exception as the `DataLoader` does. Workers end with the iterator, with
    this process, and if this process is killed. Results are pickled, and pinned by their method
    `pin_memory`.
    """
    if workers == 0 or len(numbers) < 2:
        yield from map(function, numbers)
        return
    loader = DataLoader(
        _Results(function),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        multiprocessing_context=_start_method(),
    )
    with block_interrupts(), _frozen_objects():
        running = iter(loader)
    # At exit Python sends SIGTERM to workers, which ignore it, and waits: shut them down first.
    # torch does so when the iterator is collected, which a traceback may delay.
    end_workers: Callable[[], None] = running._shutdown_workers  # type: ignore[attr-defined]
    atexit.register(end_workers)
    try:
        for result in running:
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        atexit.unregister(end_workers)
        end_workers()


class _Results(Dataset, Generic[ResultT]):
    """Map-style dataset of the results, for the worker processes of torch's `DataLoader`."""

    def __init__(self, function: Callable[[int], ResultT]):
        self.function = function

    def __getitem__(self, number: int) -> ResultT | Exception:
        try:
            return self.function(number)
        except MmmambaError as error:
            # torch would re-raise it as text with the worker's traceback.
            return error


def _start_method() -> str | None:
    """`fork` on Linux, None (Python's default) elsewhere.

    In a process that was itself spawned the default is `spawn`: each worker then imports torch and
    receives the corpus as a pickle, one after the other, which takes minutes. A fork of a process
    with a CUDA context is safe if it never calls CUDA: workers compute on the CPU, and
    `_frozen_objects` keeps their garbage collector from freeing inherited GPU tensors.
    """
    return "fork" if sys.platform == "linux" else None


@contextmanager
def _frozen_objects() -> Iterator[None]:
    """Exclude the objects of this process from the garbage collector of processes forked here.

    A worker would free GPU tensors in unreachable reference cycles, such as those of the model of
    an earlier stage. CUDA does not work in a forked process, so the worker would abort.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _ignore_signals(_: int) -> None:
    """Ignore SIGINT and SIGTERM, which reach all processes; the main process handles them.

    A worker ends when the main process shuts it down or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
