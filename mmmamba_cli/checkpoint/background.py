"""Work on tensors in a few threads, with a bound on the bytes that wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class BoundedPool:
    """A thread pool whose `submit` blocks while more than `max_pending_bytes` are under way.

    A job larger than that waits until it is alone. Hashing and file writes release the
    interpreter's lock, so that they run beside each other and beside PyTorch.
    """

    def __init__(self, max_pending_bytes: int, workers: int = 2):
        self._pool = ThreadPoolExecutor(workers)
        self._limit = max_pending_bytes
        self._pending = 0
        self._changed = threading.Condition()

    def submit(self, nbytes: int, job: Callable[[], Result]) -> Future[Result]:
        """Queue `job`, which holds on to `nbytes` until it is done."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._pending or self._pending + nbytes <= self._limit
            )
            self._pending += nbytes
        future = self._pool.submit(job)
        future.add_done_callback(lambda _: self._release(nbytes))
        return future

    def close(self) -> None:
        """Drop what has not started and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _release(self, nbytes: int) -> None:
        with self._changed:
            self._pending -= nbytes
            self._changed.notify_all()
