"""The processes of a run. A single process is a world of one, without a process group.

Threads of the host beside a GPU.

Random numbers that depend on where one is, not on how one got there.
"""

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

# Enough for the small CPU tensors of a step; more wait for each other beside busy loader workers.
MAX_CPU_THREADS = 2


@contextmanager
def limit_cpu_threads(device: torch.device) -> Iterator[None]:
    """Limit PyTorch's CPU threads of this process to MAX_CPU_THREADS while `device` is a GPU.

    On a CPU the threads are those that compute, and stay as they are. The limit is the process's;
    what it was before is put back.
    """
    before = torch.get_num_threads()
    if device.type != "cpu":
        torch.set_num_threads(min(before, MAX_CPU_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_seed(seed: int, *place: str | int) -> int:
    """A 63-bit seed from the run's seed and a place such as ("stage1", step, rank)."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's generator and torch's on every device."""
    random.seed(seed)
    torch.manual_seed(seed)


Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among `size`; `mesh` is None where there is only one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a CPU tensor, the same on each."""
        total = values.detach().cpu().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether any process says so, so that all of them act alike."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag))) > 0)

    def all_gather(self, values: Sequence[Result]) -> list[Result]:
        """The values of every process, in the order of ranks, on each process.

        The values are pickled between the processes of one run.
        """
        if self.size == 1:
            return list(values)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(values))
        return [value for part in parts for value in part]

    def barrier(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def run_on_main(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on process 0, on every process; its MmmambaError is raised on each.

        So nobody waits for a process that has given up.
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
    """The world torchrun describes in the environment, or a world of one.

    `device` is "cpu", "cuda" or None for the best there is; with several processes each takes the
    GPU of its local rank. CPU tensors go over gloo, GPU tensors over nccl.

    Raises `MmmambaError` for another device, and if a GPU is asked for and there is none.
    """
    chosen = pick_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(chosen)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device("cuda", local) if chosen.type == "cuda" else chosen
    if own.type == "cuda":
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise MmmambaError(
                f"process {local} of this machine has no GPU of its own: there are {gpus}",
                "start torchrun with --nproc-per-node of at most that",
            )
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size)
    try:
        yield World(own, rank, size, init_device_mesh(own.type, (size,)))
        # Nobody takes the group down while another still reads from it.
        dist.barrier()
    finally:
        dist.destroy_process_group()
