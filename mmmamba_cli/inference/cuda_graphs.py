"""CUDA graph capture in a shared memory pool, and an LRU cache of graphs by shape."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
GraphTask = TypeVar("GraphTask", bound=Callable[[], None])
Runnable = Callable[[], None]
Capture = Callable[[Runnable], Runnable]

# Warm-up lets Triton compile and libraries allocate their workspaces before the capture.
WARM_UP_STEPS = 3
# Shapes kept by a `GraphCache`; the least recently used goes first.
MAX_CACHED_SHAPES = 16
# Capture a graph if a shape is used at least this often in one prompt, or on its second use.
MIN_CAPTURE_USES = 6


def supports_graphs(weight: Tensor, backend: str) -> bool:
    """Whether to capture steps by default: on a GPU, with Triton kernels."""
    has_triton = importlib.util.find_spec("triton") is not None and backend != "reference"
    return weight.is_cuda and weight.dtype != torch.float64 and has_triton


class GraphPool:
    """Memory shared by graphs that never run concurrently and keep no results in it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.handle = torch.cuda.graph_pool_handle()
        # One stream for all captures: the allocator reuses a block only on its own stream.
        self.stream = torch.cuda.Stream(device)

    def capture(self, run: Runnable, rng: torch.Generator | None = None) -> Runnable:
        """Capture `run` as a CUDA graph and return its replay.

        `run` is executed `WARM_UP_STEPS` times with all its side effects; the capture itself
        computes nothing. `run` may draw from `rng`, which advances with every replay.
        """
        with torch.cuda.device(self.device):
            side = self.stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_STEPS):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            if rng is not None:
                graph.register_generator_state(rng)
            with _no_gc(), torch.cuda.graph(graph, pool=self.handle, stream=side):
                run()
        return graph.replay


@contextmanager
def _no_gc() -> Iterator[None]:
    """Disable garbage collection: destroying another graph invalidates the current capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class GraphCache(Generic[Key, GraphTask]):
    """LRU cache of tasks by shape, each captured as a CUDA graph once its shape recurs."""

    def __init__(self, make: Callable[[Key], GraphTask], capture: Capture):
        self._make = make
        self._capture = capture
        self._tasks: dict[Key, GraphTask] = {}
        self._runnables: dict[Key, Runnable] = {}

    def get(self, key: Key, uses: int = 1) -> tuple[GraphTask, Runnable]:
        """The task of a shape, and the function that runs it (a graph replay, or the task itself).

        `uses` is how often the caller will run it now. A capture runs the task, so its buffers must
        be set afterwards.
        """
        task = self._tasks.pop(key, None)
        recurs = task is not None
        if task is None:
            while len(self._tasks) >= MAX_CACHED_SHAPES:
                oldest = next(iter(self._tasks))
                del self._tasks[oldest]
                self._runnables.pop(oldest, None)
            task = self._make(key)
        # Reinsert at the end: the dict is ordered by last use.
        self._tasks[key] = task
        if key not in self._runnables and (recurs or uses >= MIN_CAPTURE_USES):
            try:
                self._runnables[key] = self._capture(task)
            except torch.OutOfMemoryError:
                # Eager launches need less memory than a graph.
                self._runnables[key] = task
        return task, self._runnables.get(key, task)
