"""Content hashes of checkpoints: SHA-256 over per-tensor digests, independent of sharding.

The digest of a tensor covers its name, dtype, shape and bytes in row order. The content hash covers
the digests in the order of the names. `BoundedPool` runs hashing and writing in threads.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from mmmamba_cli.checkpoint.tensor_info import TensorInfo
from mmmamba_cli.checkpoint.tensor_io import (
    byte_chunks,
    is_finite_chunk,
    is_same_memory,
    non_finite_error,
)

if TYPE_CHECKING:
    from mmmamba_cli.checkpoint.tensor_source import TensorSource

Result = TypeVar("Result")

# More would be read from the disk a second time where memory is short.
AHEAD_BYTES = 4 << 30
# A thread waits up to 5 ms for the interpreter after each chunk while another one imports.
DIGEST_CHUNK_BYTES = 16 << 20


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


def raise_failures(pending: deque[Future[Any]]) -> None:
    """Remove the jobs at the front of `pending` that are done; raise the error of a failed one."""
    while pending and pending[0].done():
        pending.popleft().result()


def start_digest(name: str, info: TensorInfo) -> Any:
    """A SHA-256 object updated with name, dtype and shape; the caller adds the bytes."""
    return hashlib.sha256(json.dumps([name, info.dtype_name, list(info.shape)]).encode())


def tensor_digest(name: str, tensor: Tensor, *, check: bool = False) -> bytes:
    """The digest of a named tensor, 32 bytes.

    `check` raises `CheckpointError` if it has NaN or infinite values.
    """
    digest = start_digest(name, TensorInfo.of(tensor.dtype, tuple(tensor.shape)))
    for chunk in byte_chunks(tensor, DIGEST_CHUNK_BYTES):
        if check and not is_finite_chunk(chunk, tensor.dtype):
            raise non_finite_error(tensor, name)
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
        self._pending: deque[Future[bytes]] = deque()
        # Weak references: a tensor's memory may be released once it is hashed.
        self._tensors: dict[str, weakref.ref[Tensor]] = {}
        self._ahead: dict[str, tuple[Tensor, Future[bytes]]] = {}

    def submit_ahead(self, source: TensorSource) -> None:
        """Queue, checked, the first `AHEAD_BYTES` of a source before they are submitted.

        Importing transformers keeps one core busy for seconds, while the others can hash. Only
        memory-mapped tensors are queued, since others would take memory. A tensor that is not
        submitted later is in no result.
        """
        room = AHEAD_BYTES if source.kind == "safetensors" else 0
        for name in source.names:
            room -= source.info(name).nbytes
            if room < 0:
                return
            tensor = source.read(name)
            job = partial(tensor_digest, name, tensor, check=True)
            self._ahead[name] = tensor, self._pool.submit(0, job)

    def submit(self, name: str, tensor: Tensor, *, check: bool = False) -> Tensor:
        """Queue one tensor and return it; a name may be submitted only once.

        Returns the tensor of `submit_ahead` instead if it is the same memory.

        With `check`, a later `submit`, `digests` or `result` raises `CheckpointError` if the tensor
        has NaN or infinite values.
        """
        if name in self._futures:
            raise ValueError(f"tensor {name} was already hashed")
        raise_failures(self._pending)
        ahead = self._ahead.pop(name, None)
        if ahead is not None and is_same_memory(ahead[0], tensor):
            tensor, job = ahead
        else:
            digest = partial(tensor_digest, name, tensor, check=check)
            job = self._pool.submit(tensor.nbytes, digest)
        self._futures[name] = job
        self._pending.append(job)
        self._tensors[name] = weakref.ref(tensor)
        return tensor

    def digest_of(self, name: str, tensor: Tensor) -> Future[bytes] | None:
        """The digest of `tensor` if this object was submitted under `name`, else None."""
        known = self._tensors.get(name)
        return self._futures[name] if known is not None and known() is tensor else None

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
