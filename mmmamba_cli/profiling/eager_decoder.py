"""Eager decoder: the model's forward pass with a transformers cache.

Legend: B batch, T tokens, V vocabulary, K key/value heads, H query heads, P head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmmamba_cli.architecture import FP32_BYTES, cache_bytes
from mmmamba_cli.devices import require_memory
from mmmamba_cli.model import ATTENTION, HolisticVLM, HolisticVLMConfig, HybridCache, new_cache
from mmmamba_cli.model.cache import write_ssm_state
from mmmamba_cli.profiling.interfaces import CACHES, STATIC, Cost
from mmmamba_cli.profiling.roofline import count_weights, minimum_cost

# Prefill chunk in columns of a model without attention. A model with attention reads the whole
# prompt at once, because `is_causal=True` describes the mask only then.
PREFILL_CHUNK = 8192
# Random contents of a cache repeat after this many columns, because drawing them takes time.
RANDOM_COLUMNS = 1024
# Activations alive at the same time in a prefill: tensors as wide as the MLP, and as the model.
MLP_ACTIVATIONS, HIDDEN_ACTIVATIONS = 3, 6


class EagerDecoder:
    """A `Decoder` with one forward pass per token and a growing or a static cache."""

    def __init__(self, model: HolisticVLM, cache: str):
        self.model = model
        self.kind = cache
        self.cache: HybridCache | None = None
        self.last: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @property
    def weight_bytes(self) -> int:
        return tensor_bytes(self.model)

    @property
    def cache_bytes(self) -> int:
        return 0 if self.cache is None else sum(map(layer_bytes, self.cache.layers))

    def cost(self, batch: int, context: int, prefill: bool) -> Cost:
        weights = count_weights(self.model)
        return minimum_cost(self.model.config, weights, self.dtype, batch, context, prefill)

    def random_prompt(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        return random_ids(self.model.config, batch, length, rng).to(self.device)

    def start(self, batch: int, columns: int) -> None:
        self.release()
        size = expected_cache_bytes(self.model.config, batch, columns, self.dtype)
        require_memory(self.device, size, f"a cache of {columns:,} columns")
        self.cache = new_cache(self.model.config, columns if self.kind == STATIC else None)

    @torch.no_grad()
    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        length, config = ids.shape[1], self.model.config
        if chunk is None and not config.attention_layers:
            chunk = PREFILL_CHUNK
        columns = length if chunk is None else min(chunk, length)
        size = activation_bytes(config, ids.shape[0], columns, self.dtype)
        require_memory(self.device, size, f"a prefill of {length:,} columns")
        return self._forward(ids, columns if columns < length else None)

    @torch.no_grad()
    def fill_random(self, batch: int, columns: int, rng: torch.Generator) -> None:
        assert self.cache is not None, "start comes first"
        # Advances the lengths and RoPE frequencies of both stacks, as a prefill does.
        self.model.model.prepare(self.random_prompt(batch, columns, rng), cache=self.cache)
        self.last = self.random_prompt(batch, 1, rng)
        config = self.model.config
        # Drawn on the device: a CPU would take seconds for a long context.
        rng = torch.Generator(self.device).manual_seed(rng.initial_seed())
        for layer, kind in enumerate(config.layer_types):
            stack = config.stack_of(layer)
            if kind == ATTENTION:
                shape = (batch, stack.num_kv_heads, columns, stack.head_dim)
                keys, values = (
                    random_normal(shape, rng, self.model.lm_head.weight) for _ in range(2)
                )
                self.cache.update(keys, values, layer)
                continue
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            states = self.model.model.blocks[layer].mixer.empty_states(batch, like)
            noise = (random_normal(tuple(state.shape), rng, state) for state in states)
            write_ssm_state(self.cache, layer, *noise)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids, None)

    @torch.no_grad()
    def decode(self, count: int) -> Tensor:
        assert self.last is not None, "fill comes first"
        for _ in range(count):
            self.last = self._forward(self.last, None).argmax(-1, keepdim=True)
        return self.last

    def release(self) -> None:
        self.cache = self.last = None

    def forward_without_cache(self, ids: Tensor, last: int) -> Tensor:
        return forward_without_cache(self.model, ids, last)

    def in_fp32(self) -> EagerDecoder:
        return type(self)(fp32_copy(self.model), self.kind)

    def variants(self) -> Mapping[str, EagerDecoder]:
        others = (kind for kind in CACHES if kind != self.kind)
        return {f"{kind} cache": EagerDecoder(self.model, kind) for kind in others}

    def _forward(self, ids: Tensor, chunk: int | None) -> Tensor:
        assert self.cache is not None, "start comes first"
        output = self.model(
            ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            prefill_chunk_size=chunk,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def random_normal(shape: tuple[int, ...], rng: torch.Generator, like: Tensor) -> Tensor:
    """Normal numbers of `shape`, repeated along the third dimension after RANDOM_COLUMNS.

    Dtype and device are those of `like`.
    """
    length = shape[2]
    drawn = (*shape[:2], min(length, RANDOM_COLUMNS), *shape[3:])
    block = torch.randn(drawn, generator=rng, device=like.device).to(like.dtype)
    if length <= RANDOM_COLUMNS:
        return block
    times = -(-length // RANDOM_COLUMNS)
    return block.repeat(1, 1, times, *([1] * (len(shape) - 3)))[:, :, :length]


def random_ids(config: HolisticVLMConfig, batch: int, length: int, rng: torch.Generator) -> Tensor:
    """Ids (B, T) without images, on the CPU."""
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=rng)
    vision = config.vision_config
    if vision is None:
        return ids
    # Any other token: an image token needs pixels.
    other = (vision.image_token_id + 1) % config.vocab_size
    return ids.masked_fill(ids == vision.image_token_id, other)


@torch.no_grad()
def forward_without_cache(model: HolisticVLM, ids: Tensor, last: int) -> Tensor:
    """Logits (B, last, V) of the last columns of ids (B, T), in one forward pass."""
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=last).logits
    return logits


def fp32_copy(model: HolisticVLM) -> HolisticVLM:
    """A copy of the model in fp32; int8 weights stay int8.

    Raises:
        OutOfMemory: if the copy does not fit.
    """
    # The copy is made in the model's dtype and then converted tensor by tensor.
    size = tensor_bytes(model)
    device = model.model.text_embedding.weight.device
    require_memory(device, size + size * FP32_BYTES // model.dtype.itemsize, "a copy of it in fp32")
    return copy.deepcopy(model).float()


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, or of the int8 weights in their place."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def expected_cache_bytes(
    config: HolisticVLMConfig, batch: int, columns: int, dtype: torch.dtype
) -> int:
    """Bytes of a cache after `columns` columns, without the conv states, which are negligible."""
    size = cache_bytes(config, batch, columns, dtype.itemsize)
    return size.kv_cache + size.ssm_state


def activation_bytes(
    config: HolisticVLMConfig, batch: int, columns: int, dtype: torch.dtype
) -> int:
    """Approximate peak bytes of activations of a prefill."""
    inner = max(config.stack_of(i).intermediate_size for i in range(config.num_hidden_layers))
    width = MLP_ACTIVATIONS * inner + HIDDEN_ACTIVATIONS * config.hidden_size
    return batch * columns * width * dtype.itemsize


def layer_bytes(layer: object) -> int:
    """Bytes of a transformers cache layer of any kind."""
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        tensors += getattr(layer, name, {}).values()
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
