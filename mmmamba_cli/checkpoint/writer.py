"""Write tensors as sharded safetensors, each straight to its place in its file.

The plan is known before the first tensor, so headers go first and no shard is held in memory.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from torch import Tensor

from mmmamba_cli.checkpoint.hashing import BoundedPool, combined_hash, start_digest
from mmmamba_cli.checkpoint.safetensors_file import build_header
from mmmamba_cli.checkpoint.tensor_info import TensorInfo
from mmmamba_cli.checkpoint.tensor_io import byte_chunks, cast_chunks
from mmmamba_cli.errors import CheckpointError

MAX_SHARD_BYTES = 1_000_000_000
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class ShardedWriter:
    """Writes a plan of tensors into `folder`: one file, or shards and an index.

    `plan` gives name, dtype and shape in the order in which they fill the shards. Each planned
    tensor is to be written once, with just that dtype and shape; anything else is our bug and
    raises `ValueError`. Files stay within `max_shard_bytes` unless one tensor is larger by itself.

    Writing and hashing run in background threads: a tensor handed to `write` must not change until
    `finish` has returned. Failed writes raise their `OSError` from a later `write` or `finish`.
    As a context manager it finishes on leaving, and on an error lets go of its files.
    """

    def __init__(
        self, folder: Path, plan: Mapping[str, TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES
    ):
        if not plan:
            raise ValueError("the plan names no tensors")
        self._folder = folder
        self._plan = dict(plan)
        self.content_hash: str | None = None
        shards = plan_shards(plan, max_shard_bytes)
        self.files = [folder / name for name in shard_names(len(shards))]
        self._shard_of = {name: number for number, shard in enumerate(shards) for name in shard}
        self._left = [len(shard) for shard in shards]
        headers = [build_header({name: plan[name] for name in shard}) for shard in shards]
        self._places = {name: place for _, places in headers for name, place in places.items()}
        _check_room(folder, sum(len(head) for head, _ in headers) + _total_bytes(plan))
        self._heads = [head for head, _ in headers]
        self._descriptors: dict[int, int] = {}
        self._written: dict[str, Future[bytes]] = {}
        self._synced: list[Future[None]] = []
        self._pool = BoundedPool(max_pending_bytes=128 << 20)

    def write(self, name: str, tensor: Tensor, cast: bool = False) -> None:
        """Queue one tensor (any strides) for writing; blocks while much is under way.

        With `cast` it is converted to the planned dtype on the way, a piece at a time. A value too
        large for that dtype raises `CheckpointError` from a later `write` or `finish`.
        """
        planned = self._plan.get(name)
        if planned is None:
            raise ValueError(f"tensor {name} is not in the plan")
        if name in self._written:
            raise ValueError(f"tensor {name} was already written")
        dtype = planned.dtype if cast else tensor.dtype
        if TensorInfo.of(dtype, tuple(tensor.shape)) != planned:
            raise ValueError(
                f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"planned is {planned.dtype} {list(planned.shape)}"
            )
        self._raise_failure()
        shard = self._shard_of[name]
        job = functools.partial(
            write_and_digest, self._open(shard), self._places[name], name, tensor, planned
        )
        self._written[name] = self._pool.submit(tensor.nbytes, job)
        self._left[shard] -= 1
        if self._left[shard] == 0:
            mates = [job for mate, job in self._written.items() if self._shard_of[mate] == shard]
            sync = functools.partial(_sync, self._descriptors[shard], mates)
            self._synced.append(self._pool.submit(0, sync))

    def finish(self) -> str:
        """Wait for all writes, write the index, and return the content hash of what was written."""
        if self.content_hash is None:
            missing = [name for name in self._plan if name not in self._written]
            if missing:
                raise ValueError(f"{len(missing)} planned tensors were not written: {missing[:10]}")
            digests = {name: job.result() for name, job in self._written.items()}
            for job in self._synced:
                job.result()
            self.close()
            if len(self.files) > 1:
                self._write_index()
            self.content_hash = combined_hash(digests)
        return self.content_hash

    def close(self) -> None:
        """Stop the threads and let go of the files, finished or not."""
        self._pool.close()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def _open(self, shard: int) -> int:
        if shard not in self._descriptors:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(self.files[shard], flags, 0o666)
            self._descriptors[shard] = descriptor
            _write_at(descriptor, 0, memoryview(self._heads[shard]))
        return self._descriptors[shard]

    def _raise_failure(self) -> None:
        for job in self._written.values():
            if job.done():
                job.result()

    def _write_index(self) -> None:
        weight_map = {name: self.files[self._shard_of[name]].name for name in sorted(self._plan)}
        index = {"metadata": {"total_size": _total_bytes(self._plan)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (self._folder / INDEX_NAME).write_text(text, encoding="utf-8")


def plan_shards(plan: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    """Fill shards with the names in order, each file within the limit if its tensors allow it."""
    shards: list[list[str]] = []
    room = 0
    for name, info in plan.items():
        # A header entry is the name as JSON and well under 200 bytes, and 20 for each dimension.
        need = info.nbytes + len(json.dumps(name)) + 200 + 20 * len(info.shape)
        if not shards or need > room:
            shards.append([])
            room = max_shard_bytes - 100
        shards[-1].append(name)
        room -= need
    return shards


def shard_names(count: int) -> list[str]:
    """The file names of a checkpoint of `count` shards."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_and_digest(
    descriptor: int, place: int, name: str, tensor: Tensor, info: TensorInfo
) -> bytes:
    """Write the tensor at `place` of an open file in the dtype of `info`; return its digest."""
    digest = start_digest(name, info)
    same = tensor.dtype == info.dtype
    for chunk in byte_chunks(tensor) if same else cast_chunks(tensor, info.dtype, name):
        _write_at(descriptor, place, chunk)
        digest.update(chunk)
        place += len(chunk)
    return digest.digest()


def _write_at(descriptor: int, place: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(descriptor, data, place)
        place += count
        data = data[count:]


def _sync(descriptor: int, writes: list[Future[bytes]]) -> None:
    """Once its tensors are in, bring a shard to the disk while the next one is being made."""
    for job in writes:
        job.result()
    os.fsync(descriptor)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed",
            "make room, or write to another disk",
        )


def _total_bytes(plan: Mapping[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in plan.values())
