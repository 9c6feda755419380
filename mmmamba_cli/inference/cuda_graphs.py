"""CUDA graphs: work of a fixed size, captured once, then launched as a whole."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made", bound=Callable[[], None])
Work = Callable[[], None]
Capture = Callable[[Work], Work]

# Triton compiles, and libraries take their workspaces, before anything is captured.
WARM_UP_STEPS = 3
# So much work is kept; what was done longest ago goes first.
MOST_WORKS = 16
# So many times one work at once are worth a graph; fewer, when it is asked for a second time.
ENOUGH = 6


class GraphPool:
    """Memory that graphs share: they never run at the same time, and keep nothing there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.handle = torch.cuda.graph_pool_handle()
        # One for all: memory is taken up again on the stream that it was given to.
        self.stream = torch.cuda.Stream(device)

    def capture(self, work: Work, rng: torch.Generator | None = None) -> Work:
        """A function that does on the device what `work` does, without its launches.

        `work` runs a few times and changes what it changes; capturing itself computes nothing.
        It may draw numbers from `rng`, which goes on from replay to replay.
        """
        with torch.cuda.device(self.device):
            side = self.stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_STEPS):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            if rng is not None:
                graph.register_generator_state(rng)
            with _keeping_garbage(), torch.cuda.graph(graph, pool=self.handle, stream=side):
                work()
        return graph.replay


@contextmanager
def _keeping_garbage() -> Iterator[None]:
    """Without collecting: what lets go of another graph spoils the one that is being captured."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Works(Generic[Key, Made]):
    """Work by what it is made for, as graphs where it comes often, and not all that ever was."""

    def __init__(self, make: Callable[[Key], Made], capture: Capture):
        self._make = make
        self._capture = capture
        self._made: dict[Key, Made] = {}
        self._runs: dict[Key, Work] = {}

    def prepared(self, key: Key, count: int = 1) -> tuple[Made, Work]:
        """The work and what runs it, which will be done `count` times.

        Capturing runs the work, and so leaves what it changes anyhow.
        """
        made = self._made.pop(key, None)
        known = made is not None
        if made is None:
            while len(self._made) >= MOST_WORKS:
                oldest = next(iter(self._made))
                del self._made[oldest]
                self._runs.pop(oldest, None)
            made = self._make(key)
        # The last in order is the last that was asked for.
        self._made[key] = made
        if key not in self._runs and (known or count >= ENOUGH):
            try:
                self._runs[key] = self._capture(made)
            except torch.OutOfMemoryError:
                # Launched one by one it needs less.
                self._runs[key] = made
        return made, self._runs.get(key, made)
