"""Fast decoder: `mmmamba_cli.inference`, with packed weights and one CUDA graph per token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmmamba_cli.devices import require_memory
from mmmamba_cli.inference import Generator
from mmmamba_cli.inference.prefill import GPU_CHUNK_TOKENS
from mmmamba_cli.inference.sampling import Settings
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.profiling.eager_decoder import (
    activation_bytes,
    expected_cache_bytes,
    forward_without_cache,
    fp32_copy,
    random_ids,
    tensor_bytes,
)
from mmmamba_cli.profiling.interfaces import Cost, Decoder
from mmmamba_cli.profiling.roofline import count_weights, minimum_cost

# Without EOS every requested token is decoded.
GREEDY = Settings(eos=())


class FastDecoder:
    """A `Decoder` over a `Generator`, which documents `graphs`."""

    def __init__(self, model: HolisticVLM, graphs: bool | None = None):
        self.model = model
        self._graphs = graphs
        self.generator = Generator(model, graphs=graphs)
        self.columns = 0
        self._size = (0, 0)

    @property
    def _table(self) -> Tensor:
        # The head may be int8; the token table never is.
        return self.model.model.text_embedding.weight

    @property
    def device(self) -> torch.device:
        return self._table.device

    @property
    def dtype(self) -> torch.dtype:
        return self._table.dtype

    @property
    def weight_bytes(self) -> int:
        return tensor_bytes(self.model)

    @property
    def cache_bytes(self) -> int:
        return self.generator.cache_bytes

    def cost(self, batch: int, context: int, prefill: bool) -> Cost:
        weights = count_weights(self.model)
        return minimum_cost(self.model.config, weights, self.dtype, batch, context, prefill)

    def random_prompt(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        return random_ids(self.model.config, batch, length, rng).to(self.device)

    def start(self, batch: int, columns: int) -> None:
        """Allocate the cache and capture the graphs, outside the timed part.

        Graphs are kept if batch and columns are those of the previous call.
        """
        if (batch, columns) != self._size:
            self.release()
        self._size = (batch, columns)
        size = expected_cache_bytes(self.model.config, batch, columns, self.dtype)
        require_memory(self.device, size, f"a cache of {columns:,} columns")
        self.columns = columns
        self.generator.start(batch, columns)

    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        batch, length = ids.shape
        config = self.model.config
        whole = bool(config.attention_layers) and chunk is None
        columns = length if whole else min(length, chunk or GPU_CHUNK_TOKENS)
        size = activation_bytes(config, batch, columns, self.dtype)
        require_memory(self.device, size, f"a prefill of {length:,} columns")
        return self.generator.prefill(ids, capacity=self.columns, chunk=chunk)

    def fill_random(self, batch: int, columns: int, rng: torch.Generator) -> None:
        seed = rng.initial_seed()
        self.generator.fill_random(batch, columns, self.columns, seed, GREEDY)

    def step(self, ids: Tensor) -> Tensor:
        return self.generator.step(ids)

    def decode(self, count: int) -> Tensor:
        return self.generator.decode_tokens(count)

    def release(self) -> None:
        self._size = (0, 0)
        self.generator.release()

    def forward_without_cache(self, ids: Tensor, last: int) -> Tensor:
        return forward_without_cache(self.model, ids, last)

    def in_fp32(self) -> FastDecoder:
        return type(self)(fp32_copy(self.model), self._graphs)

    def variants(self) -> Mapping[str, Decoder]:
        return {}
