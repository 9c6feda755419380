"""Threads of the host beside a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Enough for the small CPU tensors of a step; more wait for each other beside busy loader workers.
HOST_THREADS = 2


@contextmanager
def host_threads(device: torch.device) -> Iterator[None]:
    """Limit PyTorch's CPU threads of this process to HOST_THREADS while `device` is a GPU.

    On a CPU the threads are those that compute, and stay as they are. The limit is the process's;
    what it was before is put back.
    """
    before = torch.get_num_threads()
    if device.type != "cpu":
        torch.set_num_threads(min(before, HOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
