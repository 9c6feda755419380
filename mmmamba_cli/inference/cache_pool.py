"""LRU pool of static caches, each with the CUDA graphs captured over it."""

from __future__ import annotations

from functools import partial

from mmmamba_cli.inference.cuda_graphs import GraphPool, Runnable
from mmmamba_cli.inference.decode_step import decode_step
from mmmamba_cli.inference.graph_prefill import (
    ChunkGraphs,
    PromptGraphs,
    supports_chunk_graphs,
    supports_prompt_graphs,
)
from mmmamba_cli.inference.packed_model import PackedModel
from mmmamba_cli.inference.prefill import GraphPrefill
from mmmamba_cli.inference.sampling import Sampler, SamplingMode
from mmmamba_cli.inference.static_cache import StaticCache, kv_nbytes
from mmmamba_cli.model import HolisticVLM

# Capacities are multiples of this many columns, so that prompts of similar length share a graph and
# the warm-up steps of a capture always fit.
PAD_CAPACITY_TO = 256
# Limits on the pooled caches, in number and in total bytes; the cache in use may exceed the latter.
MAX_CACHES = 4
MAX_POOL_BYTES = 2 * 2**30


class CachePool:
    """Static caches by batch size and capacities, and the functions that advance them."""

    def __init__(
        self, model: HolisticVLM, packed: PackedModel, sampler: Sampler, graphs: bool, backend: str
    ):
        self._model = model
        self._packed = packed
        self._sampler = sampler
        self._graphs = graphs
        self._backend = backend
        self._graph_pool: GraphPool | None = None
        self._caches: dict[tuple[int, tuple[int, ...]], StaticCache] = {}
        self._steps: dict[tuple[StaticCache, SamplingMode | None], Runnable] = {}
        self._prefills: dict[StaticCache, GraphPrefill] = {}

    def take(
        self, batch: int, capacity: int, extra: int, mode: SamplingMode | None
    ) -> tuple[StaticCache, Runnable]:
        """A cache with arbitrary contents, and the function that advances it by one token.

        The cache has at least `capacity` columns, and `extra` more in the embedding stack. The
        function is `decode_step`, with sampling if there is a `mode`, or the replay of its
        graph.
        """
        columns = [round_up(capacity)] * len(self._packed.stacks)
        # The embedding stack is the first of two.
        columns[0] += round_up(extra)
        capacities = tuple(
            count if stack.has_attention else 0
            for count, stack in zip(columns, self._packed.stacks, strict=True)
        )
        cache = self._caches.pop((batch, capacities), None)
        if cache is None:
            self._evict(kv_nbytes(self._packed, batch, capacities))
            cache = StaticCache(self._packed, batch, capacities)
        # Reinsert at the end: the dict is ordered by last use.
        self._caches[batch, capacities] = cache
        if (cache, mode) not in self._steps:
            step: Runnable = partial(decode_step, cache, self._backend, self._sampler, mode)
            if self._graphs:
                # Reset the cache first: warm-up steps write a few columns.
                cache.clear()
                step = self._capture(step)
            self._steps[cache, mode] = step
        return cache, self._steps[cache, mode]

    def graph_prefill(self, cache: StaticCache) -> GraphPrefill | None:
        """The prefill graphs over `cache`; None without graphs, or for unsupported mixers."""
        if not (self._graphs and supports_prompt_graphs(self._packed)):
            return None
        if cache not in self._prefills:
            kind = ChunkGraphs if supports_chunk_graphs(self._packed) else PromptGraphs
            self._prefills[cache] = kind(self._model, cache, self._capture)
        return self._prefills[cache]

    def clear(self) -> None:
        """Free all caches and graphs."""
        self._steps.clear()
        self._prefills.clear()
        self._caches.clear()
        self._graph_pool = None

    def _capture(self, run: Runnable) -> Runnable:
        if self._graph_pool is None:
            self._graph_pool = GraphPool(self._packed.text_embedding.device)
        return self._graph_pool.capture(run, self._sampler.rng)

    def _evict(self, nbytes: int) -> None:
        """Free the least recently used caches until one of `nbytes` fits the limits."""
        while self._caches and (
            len(self._caches) >= MAX_CACHES
            or nbytes + sum(cache.nbytes for cache in self._caches.values()) > MAX_POOL_BYTES
        ):
            oldest = self._caches.pop(next(iter(self._caches)))
            self._steps = {key: step for key, step in self._steps.items() if key[0] is not oldest}
            self._prefills.pop(oldest, None)
        if not self._caches:
            # CUDA does not reuse a graph pool after its last graph is gone.
            self.clear()


def round_up(columns: int) -> int:
    """Round up to the granularity of capacities."""
    return -(-columns // PAD_CAPACITY_TO) * PAD_CAPACITY_TO
