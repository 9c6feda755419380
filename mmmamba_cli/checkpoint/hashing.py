"""Content hashes of checkpoints: SHA-256 over per-tensor digests, independent of sharding.

The digest of a tensor covers its name, dtype, shape and bytes in row order. The content hash covers
the digests in the order of the names. `BoundedPool` runs hashing and writing in threads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from mmmamba_cli.checkpoint.tensor_info import TensorInfo
from mmmamba_cli.checkpoint.tensor_io import byte_chunks

Result = TypeVar("Result")


class BoundedPool:
    """A thread pool whose `submit` blocks while more than `max_pending_bytes` are pending.

    A larger job waits until no other is pending. Hashing and file writes release the GIL, so that
    they run in parallel with each other and with PyTorch.
    """

    def __init__(self, max_pending_bytes: int, workers: int = 2):
        self._pool = ThreadPoolExecutor(workers)
        self._limit = max_pending_bytes
        self._pending = 0
        self._changed = threading.Condition()

    def submit(self, nbytes: int, job: Callable[[], Result]) -> Future[Result]:
        """Queue `job`, which keeps `nbytes` in memory until it is done."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._pending or self._pending + nbytes <= self._limit
            )
            self._pending += nbytes
        future = self._pool.submit(job)
        future.add_done_callback(lambda _: self._release(nbytes))
        return future

    def close(self) -> None:
        """Cancel jobs that have not started and wait for the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _release(self, nbytes: int) -> None:
        with self._changed:
            self._pending -= nbytes
            self._changed.notify_all()


def start_digest(name: str, info: TensorInfo) -> Any:
    """A SHA-256 object updated with name, dtype and shape; the caller adds the bytes."""
    return hashlib.sha256(json.dumps([name, info.dtype_name, list(info.shape)]).encode())


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """The digest of a named tensor, 32 bytes."""
    digest = start_digest(name, TensorInfo.of(tensor.dtype, tuple(tensor.shape)))
    for chunk in byte_chunks(tensor):
        digest.update(chunk)
    return digest.digest()


def combined_hash(digests: Mapping[str, bytes]) -> str:
    """The content hash, 64 hexadecimal digits, over digests by tensor name."""
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


class TensorHasher:
    """Hashes tensors in background threads while the caller uses them.

    A tensor must not change until `result` returns. `submit` blocks while more than
    `max_pending_bytes` are pending, so that memory stays bounded.
    """

    def __init__(self, workers: int = 2, max_pending_bytes: int = 256 << 20):
        self._pool = BoundedPool(max_pending_bytes, workers)
        self._futures: dict[str, Future[bytes]] = {}

    def submit(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; a name may be submitted only once."""
        if name in self._futures:
            raise ValueError(f"tensor {name} was already hashed")
        job = self._pool.submit(tensor.nbytes, lambda: tensor_digest(name, tensor))
        self._futures[name] = job

    def digests(self) -> dict[str, bytes]:
        """Wait for all submitted tensors and return their digests by name."""
        return {name: future.result() for name, future in self._futures.items()}

    def result(self) -> str:
        """Wait for all submitted tensors and return their content hash."""
        return combined_hash(self.digests())

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> TensorHasher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
