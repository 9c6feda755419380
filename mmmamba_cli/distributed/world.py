"""Process group of a run, seeds, and CPU threads. A single process has no process group."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mmmamba_cli.devices import pick_device
from mmmamba_cli.errors import MmmambaError

# Enough for the small CPU tensors of a training step; more threads compete with loader workers.
MAX_CPU_THREADS = 2


@contextmanager
def limit_cpu_threads(device: torch.device) -> Iterator[None]:
    """Limit PyTorch's CPU threads to MAX_CPU_THREADS if `device` is a GPU, and restore them after.

    The limit holds for the whole process.
    """
    before = torch.get_num_threads()
    if device.type != "cpu":
        torch.set_num_threads(min(before, MAX_CPU_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_seed(seed: int, *place: str | int) -> int:
    """A 63-bit seed from the run's seed and a place, for example ("stage1", step, rank)."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's generator and torch's on every device."""
    random.seed(seed)
    torch.manual_seed(seed)


Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """Rank, sizes, device and mesh of this process; `mesh` is None for a single process."""

    device: torch.device
    rank: int = 0
    size: int = 1
    # Processes on this machine.
    local_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, on the CPU; every process gets the sum."""
        total = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def all_reduce_sum_on_device(self, values: Tensor) -> Tensor:
        """Sum a tensor of `device` over all processes, there; the host does not wait for a GPU."""
        total = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; the same on all of them."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag))) > 0)

    def all_gather(self, values: Sequence[Result]) -> list[Result]:
        """Concatenate the values of all processes in rank order; every process gets the list.

        Values are pickled.
        """
        if self.size == 1:
            return list(values)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(values))
        return [value for part in parts for value in part]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on process 0 and broadcast its result.

        An exception of `work` is raised on every process, as an `MmmambaError` on the others, so
        that none waits for process 0.
        """
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = work()
            except BaseException as error:
                box[1] = error if isinstance(error, MmmambaError) else MmmambaError(str(error))
                dist.broadcast_object_list(box, src=0)
                raise
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            box[1].is_reported_elsewhere = True
            raise box[1]
        return box[0]


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, or run as one process.

    `device` is "cpu", "cuda" or None for the best available one; with several processes each uses
    the GPU of its local rank. Collectives use gloo for CPU tensors and NCCL for GPU tensors.

    Raises:
        MmmambaError: the device is unknown or not available.
    """
    chosen = pick_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(chosen)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    local_device = torch.device("cuda", local) if chosen.type == "cuda" else chosen
    if local_device.type == "cuda":
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise MmmambaError(
                f"process {local} of this machine has no GPU of its own: there are {gpus}",
                "start torchrun with --nproc-per-node of at most that",
            )
        torch.cuda.set_device(local_device)
    backend = "cpu:gloo,cuda:nccl" if local_device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size)
    try:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        mesh = init_device_mesh(local_device.type, (size,))
        yield World(local_device, rank, size, local_size, mesh)
        # The group is destroyed only after all processes have finished their collectives.
        dist.barrier()
    finally:
        dist.destroy_process_group()
