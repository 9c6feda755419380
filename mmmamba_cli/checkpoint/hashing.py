"""Content hashes: SHA-256 over per-tensor digests, the same however tensors are spread over files.

A tensor's digest covers its name, dtype, shape and bytes in row order. The content hash covers the
digests in the order of the names, so neither sharding nor the order of writing changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from torch import Tensor

from mmmamba_cli.checkpoint.background import BoundedPool
from mmmamba_cli.checkpoint.tensor_info import TensorInfo
from mmmamba_cli.checkpoint.tensors import byte_chunks


def start_digest(name: str, info: TensorInfo) -> Any:
    """A SHA-256 object that has taken in the name, dtype and shape; the bytes come next."""
    return hashlib.sha256(json.dumps([name, info.element, list(info.shape)]).encode())


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """The 32-byte digest of one named tensor."""
    digest = start_digest(name, TensorInfo.of(tensor.dtype, tuple(tensor.shape)))
    for chunk in byte_chunks(tensor):
        digest.update(chunk)
    return digest.digest()


def combined_hash(digests: Mapping[str, bytes]) -> str:
    """The content hash, 64 hexadecimal digits, of tensors given by their digests."""
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


class TensorHasher:
    """Hashes tensors in background threads while the caller goes on with them.

    A tensor must not change until `result` has returned. `submit` blocks while more than
    `max_pending_bytes` wait, so that memory stays bounded.
    """

    def __init__(self, workers: int = 2, max_pending_bytes: int = 256 << 20):
        self._pool = BoundedPool(max_pending_bytes, workers)
        self._futures: dict[str, Future[bytes]] = {}

    def submit(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor. Each name once."""
        if name in self._futures:
            raise ValueError(f"tensor {name} was already hashed")
        job = self._pool.submit(tensor.nbytes, lambda: tensor_digest(name, tensor))
        self._futures[name] = job

    def digests(self) -> dict[str, bytes]:
        """Wait for all that was submitted and return their digests."""
        return {name: future.result() for name, future in self._futures.items()}

    def result(self) -> str:
        """Wait for all that was submitted and return their content hash."""
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
