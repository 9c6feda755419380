"""Decoder of transformers' models: the forward pass of their class with a cache of transformers.

Teachers are the stock classes; students have mixers in the place of attention. Legend: B batch,
T tokens, V vocabulary, K key/value heads, P head dim.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from mmmamba_cli.architecture import (
    ATTENTION,
    FP32_BYTES,
    CacheBytes,
    MixerConfig,
    kv_cache_bytes,
    mixer_spec,
)
from mmmamba_cli.devices import require_memory
from mmmamba_cli.model.cache import CACHE_NAME, write_ssm_state
from mmmamba_cli.profiling.eager_decoder import (
    HIDDEN_ACTIVATIONS,
    MLP_ACTIVATIONS,
    layer_bytes,
    random_normal,
    tensor_bytes,
)
from mmmamba_cli.profiling.interfaces import CACHES, STATIC, Cost
from mmmamba_cli.profiling.roofline import MULTIPLY_ADD, WeightCounts, weight_counts
from mmmamba_cli.teachers import student_plan, text_config
from mmmamba_cli.teachers.anatomy import ATTENTION_NAME, text_decoder
from mmmamba_cli.teachers.cache_slot import recurrent_slot
from mmmamba_cli.teachers.layer_sizes import text_layer_sizes

# Fields of configs with ids that only pictures, videos and sounds bring into a prompt.
TOKEN_FIELDS = ("_token_id", "_token_index")


class InPlaceDecoder:
    """A `Decoder` with one forward pass per token and a growing or a static cache."""

    def __init__(self, model: Any, cache: str):
        self.model = model
        self.kind = cache
        self.cache: Cache | None = None
        self.last: Tensor | None = None
        config = model.config
        plan = student_plan(config)
        self.layers = text_layer_sizes(config)
        self.mixers = ("attention",) * len(self.layers) if plan is None else plan.mixers
        self.options = MixerConfig() if plan is None else plan.options
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def _head(self) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        return self._head.device

    @property
    def dtype(self) -> torch.dtype:
        return self._head.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, those of the tower included, which text does not read."""
        return tensor_bytes(self.model)

    @property
    def cache_bytes(self) -> int:
        return 0 if self.cache is None else sum(map(layer_bytes, self.cache.layers))

    def random_prompt(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        """Random ids (B, T) without placeholders of pictures."""
        taken = _placeholder_ids(self.model.config)
        vocabulary = int(text_config(self.model.config).vocab_size)
        other = next(token for token in range(vocabulary) if token not in taken)
        ids = torch.randint(0, vocabulary, (batch, length), generator=rng)
        is_taken = torch.isin(ids, torch.tensor(sorted(taken), dtype=ids.dtype))
        return ids.masked_fill(is_taken, other).to(self.device)

    def cost(self, batch: int, context: int, prefill: bool) -> Cost:
        weights = self._weights()
        columns = context if prefill else 1
        operations = weights.operations(batch, columns)
        size = weights.bytes
        for mixer, (stack, window) in zip(self.mixers, self.layers, strict=True):
            kept = context if window is None else min(context, window)
            cache = self._layer_cache(mixer, stack, batch, kept)
            filled = kv_cache_bytes(stack, batch, kept, self.dtype.itemsize)
            size += min(cache.kv_cache, filled) + cache.ssm_state * (1 if prefill else 2)
            pairs = mixer_spec(mixer).operations
            full = min(columns, kept)
            # Beyond a window, each column sees as many keys as the last one that it fills.
            products = pairs(stack, self.options, full, kept)
            products += (columns - full) * pairs(stack, self.options, 1, kept)
            operations += batch * MULTIPLY_ADD * products
        return Cost(size, operations)

    def _weights(self) -> WeightCounts:
        # The final norm has another name in some families, and no weight to speak of.
        layers = text_decoder(self.model).layers
        return weight_counts(layers, self.model.get_output_embeddings())

    def _layer_cache(self, mixer: str, stack: Any, batch: int, columns: int) -> CacheBytes:
        return mixer_spec(mixer).cache_bytes(
            stack, self.options, batch, columns, self.dtype.itemsize
        )

    def start(self, batch: int, columns: int) -> None:
        self.release()
        sizes = [
            self._layer_cache(mixer, stack, batch, min(columns, window or columns))
            for mixer, (stack, window) in zip(self.mixers, self.layers, strict=True)
        ]
        total = sum(sizes, CacheBytes())
        what = f"a cache of {columns:,} columns"
        require_memory(self.device, total.kv_cache + total.ssm_state, what)
        config = self.model.config
        self.cache = (
            StaticCache(config=config, max_cache_len=columns)
            if self.kind == STATIC
            else DynamicCache(config=config)
        )
        for layer, mixer in enumerate(self.mixers):
            if mixer_spec(mixer).layer_type != ATTENTION:
                # The capacity of a slot is that of the layers beside it.
                recurrent_slot(self.cache, layer)

    @torch.no_grad()
    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        batch, length = ids.shape
        text = text_config(self.model.config)
        columns = length if chunk is None else min(chunk, length)
        width = MLP_ACTIVATIONS * text.intermediate_size + HIDDEN_ACTIVATIONS * text.hidden_size
        size = batch * columns * width * self.dtype.itemsize
        require_memory(self.device, size, f"a prefill of {length:,} columns")
        for start in range(0, length, columns):
            logits = self._forward(ids[:, start : start + columns])
        return logits

    @torch.no_grad()
    def fill_random(self, batch: int, columns: int, rng: torch.Generator) -> None:
        assert self.cache is not None, "start comes first"
        self.last = self.random_prompt(batch, 1, rng)
        # Drawn on the device: a CPU would take seconds for a long context.
        rng = torch.Generator(self.device).manual_seed(rng.initial_seed())
        blocks = text_decoder(self.model).layers
        for layer, mixer in enumerate(self.mixers):
            if mixer_spec(mixer).layer_type == ATTENTION:
                stack, _ = self.layers[layer]
                shape = (batch, stack.num_kv_heads, columns, stack.head_dim)
                keys, values = (random_normal(shape, rng, self._head) for _ in range(2))
                self.cache.update(keys, values, layer)
                continue
            like = self._head.new_empty(0)
            states = getattr(blocks[layer], ATTENTION_NAME).empty_states(batch, like)
            noise = [random_normal(tuple(one.shape), rng, one) for one in states]
            write_ssm_state(self.cache, layer, *noise)
            recurrent_slot(self.cache, layer).advance(columns)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids)

    @torch.no_grad()
    def decode(self, count: int) -> Tensor:
        assert self.last is not None, "fill comes first"
        for _ in range(count):
            self.last = self._forward(self.last).argmax(-1, keepdim=True)
        return self.last

    def release(self) -> None:
        self.cache = self.last = None

    @torch.no_grad()
    def forward_without_cache(self, ids: Tensor, last: int) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False, **self._kept_logits(last)).logits
        return logits[:, -last:]

    def in_fp32(self) -> InPlaceDecoder:
        # The copy is made in the model's dtype and then converted tensor by tensor.
        size = self.weight_bytes
        total = size + size * FP32_BYTES // self.dtype.itemsize
        require_memory(self.device, total, "a copy of it in fp32")
        return type(self)(copy.deepcopy(self.model).float(), self.kind)

    def variants(self) -> Mapping[str, InPlaceDecoder]:
        others = (kind for kind in CACHES if kind != self.kind)
        return {f"{kind} cache": InPlaceDecoder(self.model, kind) for kind in others}

    def _forward(self, ids: Tensor) -> Tensor:
        assert self.cache is not None, "start comes first"
        inputs = {CACHE_NAME: self.cache, **self._kept_logits(1)}
        logits: Tensor = self.model(ids, use_cache=True, **inputs).logits
        return logits[:, -1]

    def _kept_logits(self, last: int) -> dict[str, int]:
        return {"logits_to_keep": last} if self._keeps_logits else {}


def _placeholder_ids(config: Any) -> set[int]:
    """Ids that configs name, those of beginnings and ends included."""
    found: set[int] = set()
    for one in (config, text_config(config)):
        for name, value in one.to_dict().items():
            if name.endswith(TOKEN_FIELDS) and isinstance(value, int):
                found.add(value)
    return found
