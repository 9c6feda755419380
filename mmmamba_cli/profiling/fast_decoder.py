"""The decoder of `mmmamba_cli.inference`: packed or int8 weights, one CUDA graph per token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmmamba_cli.inference import Generator
from mmmamba_cli.inference.prefill import GPU_CHUNK
from mmmamba_cli.inference.sampling import Settings
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.profiling.eager_decoder import (
    activations_size,
    cache_size,
    forward_without_cache,
    random_text,
    weights_of,
    widened_copy,
)
from mmmamba_cli.profiling.interfaces import Cost, Decoder
from mmmamba_cli.profiling.roofline import cost_of, read_weights
from mmmamba_cli.profiling.timers import require

# No answer ends: every token is timed.
GREEDY = Settings(eos=())


class GeneratingDecoder:
    """A `Decoder` over a `Generator`; `graphs` as there."""

    def __init__(self, model: HolisticVLM, graphs: bool | None = None):
        self.model = model
        self._graphs = graphs
        self.generator = Generator(model, graphs=graphs)
        self.columns = 0
        self._size = (0, 0)

    @property
    def _table(self) -> Tensor:
        # The head may be int8, where this never is.
        return self.model.model.text_embedding.weight

    @property
    def device(self) -> torch.device:
        return self._table.device

    @property
    def dtype(self) -> torch.dtype:
        return self._table.dtype

    @property
    def weight_bytes(self) -> int:
        return weights_of(self.model)

    @property
    def cache_bytes(self) -> int:
        return self.generator.cache_bytes

    def cost(self, batch: int, context: int, prefill: bool) -> Cost:
        weights = read_weights(self.model)
        return cost_of(self.model.config, weights, self.dtype, batch, context, prefill)

    def prompt(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        return random_text(self.model.config, batch, length, rng).to(self.device)

    def start(self, batch: int, columns: int) -> None:
        """Captures the graph too, and is not a part of what is timed.

        Graphs are kept if it is the same once more.
        """
        if (batch, columns) != self._size:
            self.stop()
        self._size = (batch, columns)
        size = cache_size(self.model.config, batch, columns, self.dtype)
        require(self.device, size, f"a cache of {columns:,} columns")
        self.columns = columns
        self.generator.start(batch, columns)

    def read(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        batch, length = ids.shape
        config = self.model.config
        whole = bool(config.attention_layers) and chunk is None
        columns = length if whole else min(length, chunk or GPU_CHUNK)
        size = activations_size(config, batch, columns, self.dtype)
        require(self.device, size, f"a prefill of {length:,} columns")
        return self.generator.prefill(ids, capacity=self.columns, chunk=chunk)

    def fill(self, batch: int, columns: int, rng: torch.Generator) -> None:
        seed = rng.initial_seed()
        self.generator.pretend(batch, columns, self.columns, seed, GREEDY)

    def step(self, ids: Tensor) -> Tensor:
        return self.generator.step(ids)

    def tokens(self, count: int) -> Tensor:
        return self.generator.advance(count)

    def stop(self) -> None:
        self._size = (0, 0)
        self.generator.release()

    def without_cache(self, ids: Tensor, last: int) -> Tensor:
        return forward_without_cache(self.model, ids, last)

    def in_fp32(self) -> GeneratingDecoder:
        return type(self)(widened_copy(self.model), self._graphs)

    def ways(self) -> Mapping[str, Decoder]:
        return {}
