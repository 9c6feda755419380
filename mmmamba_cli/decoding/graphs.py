"""CUDA graphs of one step each: captured once, then launched as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Triton compiles, and libraries take their workspaces, before anything is captured.
WARM_UP_STEPS = 3


class GraphPool:
    """Memory that graphs share: they never run at the same time, and keep nothing there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.handle = torch.cuda.graph_pool_handle()

    def capture(
        self, work: Callable[[], None], rng: torch.Generator | None = None
    ) -> Callable[[], None]:
        """A function that does on the device what `work` does, without its launches.

        `work` runs a few times and changes what it changes; capturing itself computes nothing.
        It may draw numbers from `rng`, which goes on from replay to replay.
        """
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_STEPS):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            if rng is not None:
                graph.register_generator_state(rng)
            with torch.cuda.graph(graph, pool=self.handle, stream=side):
                work()
        return graph.replay
