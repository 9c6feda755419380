"""The model's own forward with one of transformers' caches: the plainest decoder there is.

Legend: B batch, T tokens, V vocabulary, K key/value heads, H query heads, P head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from mmmamba_cli.model import ATTENTION, HolisticVLM, HolisticVLMConfig, HybridCache, new_cache
from mmmamba_cli.model.cache import write_ssm_state
from mmmamba_cli.profiling.interfaces import CACHES, STATIC, Cost
from mmmamba_cli.profiling.roofline import cost_of, read_weights
from mmmamba_cli.profiling.timers import require

# Columns that a model without attention reads at a time. One with attention reads the whole
# prompt: only there does the causal flag of scaled_dot_product_attention say all of its mask.
CHUNK = 8192
# Random contents are drawn once and repeated: it is their size that takes time.
BLOCK = 1024
# Activations that are alive at the same time in a prefill: so many rows of a SwiGLU's width, and
# so many of the model's.
INNER_ROWS, MODEL_ROWS = 3, 6
FP32_BYTES = 4


class CachedDecoder:
    """A `Decoder`: eager, one forward a token, with a growing or a static cache."""

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
        return weights_of(self.model)

    @property
    def cache_bytes(self) -> int:
        return 0 if self.cache is None else sum(map(_layer_bytes, self.cache.layers))

    def cost(self, batch: int, context: int, prefill: bool) -> Cost:
        weights = read_weights(self.model)
        return cost_of(self.model.config, weights, self.dtype, batch, context, prefill)

    def prompt(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        return random_text(self.model.config, batch, length, rng).to(self.device)

    def start(self, batch: int, columns: int) -> None:
        self.stop()
        size = cache_size(self.model.config, batch, columns, self.dtype)
        require(self.device, size, f"a cache of {columns:,} columns")
        self.cache = new_cache(self.model.config, columns if self.kind == STATIC else None)

    @torch.no_grad()
    def read(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        length, config = ids.shape[1], self.model.config
        if chunk is None and not config.attention_layers:
            chunk = CHUNK
        columns = length if chunk is None else min(chunk, length)
        size = activations_size(config, ids.shape[0], columns, self.dtype)
        require(self.device, size, f"a prefill of {length:,} columns")
        return self._forward(ids, columns if columns < length else None)

    @torch.no_grad()
    def fill(self, batch: int, columns: int, rng: torch.Generator) -> None:
        assert self.cache is not None, "start comes first"
        # Advances what the cache knows of both stacks, RoPE's frequencies with it, as a prefill.
        self.model.model.prepare(self.prompt(batch, columns, rng), cache=self.cache)
        self.last = self.prompt(batch, 1, rng)
        config = self.model.config
        # Drawn where it is wanted: a long context's noise would take a CPU seconds.
        rng = torch.Generator(self.device).manual_seed(rng.initial_seed())
        for layer, kind in enumerate(config.layer_types):
            stack = config.stack_of(layer)
            if kind == ATTENTION:
                shape = (batch, stack.num_kv_heads, columns, stack.head_dim)
                keys, values = (self._noise(shape, rng, self.dtype) for _ in range(2))
                self.cache.update(keys, values, layer)
                continue
            channels = (stack.num_heads + 2 * stack.num_kv_heads) * stack.head_dim
            taps = config.mixer_config.conv_width - 1
            state = (batch, stack.num_heads, stack.head_dim, stack.head_dim)
            write_ssm_state(
                self.cache,
                layer,
                self._noise((batch, channels, taps), rng, self.dtype),
                self._noise(state, rng, torch.float32),
            )

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids, None)

    @torch.no_grad()
    def tokens(self, count: int) -> Tensor:
        assert self.last is not None, "fill comes first"
        for _ in range(count):
            self.last = self._forward(self.last, None).argmax(-1, keepdim=True)
        return self.last

    def stop(self) -> None:
        self.cache = self.last = None

    def without_cache(self, ids: Tensor, last: int) -> Tensor:
        return forward_without_cache(self.model, ids, last)

    def in_fp32(self) -> CachedDecoder:
        return type(self)(widened_copy(self.model), self.kind)

    def ways(self) -> Mapping[str, CachedDecoder]:
        others = (kind for kind in CACHES if kind != self.kind)
        return {f"{kind} cache": CachedDecoder(self.model, kind) for kind in others}

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

    def _noise(self, shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Normal numbers of `shape`, repeated along the third dimension where that is long."""
        length = shape[2]
        drawn = (*shape[:2], min(length, BLOCK), *shape[3:])
        block = torch.randn(drawn, generator=rng, device=self.device).to(dtype)
        if length <= BLOCK:
            return block
        times = (length + BLOCK - 1) // BLOCK
        return block.repeat(1, 1, times, *([1] * (len(shape) - 3)))[:, :, :length]


def random_text(config: HolisticVLMConfig, batch: int, length: int, rng: torch.Generator) -> Tensor:
    """Ids (B, T) without images, on the CPU."""
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=rng)
    vision = config.vision_config
    if vision is None:
        return ids
    # Any other token: a context id would want pixels.
    other = (vision.image_token_id + 1) % config.vocab_size
    return ids.masked_fill(ids == vision.image_token_id, other)


@torch.no_grad()
def forward_without_cache(model: HolisticVLM, ids: Tensor, last: int) -> Tensor:
    """Logits (B, last, V) behind the last columns of ids (B, T), at once."""
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=last).logits
    return logits


def widened_copy(model: HolisticVLM) -> HolisticVLM:
    """The model once more, in fp32; int8 weights stay. Raises `OutOfMemory` without room for it."""
    # The copy is made as it is, and widened tensor by tensor.
    size = weights_of(model)
    device = model.model.text_embedding.weight.device
    require(device, size + size * FP32_BYTES // model.dtype.itemsize, "a copy of it in fp32")
    return copy.deepcopy(model).float()


def weights_of(model: HolisticVLM) -> int:
    """Bytes of a model's parameters, and of int8 weights in their place."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())


def cache_size(config: HolisticVLMConfig, batch: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of a cache that has seen so many columns, conv states left out, which are nothing."""
    size = 0
    for layer, kind in enumerate(config.layer_types):
        stack = config.stack_of(layer)
        if kind == ATTENTION:
            size += 2 * batch * stack.num_kv_heads * columns * stack.head_dim * dtype.itemsize
        else:
            size += batch * stack.num_heads * stack.head_dim**2 * FP32_BYTES
    return size


def activations_size(
    config: HolisticVLMConfig, batch: int, columns: int, dtype: torch.dtype
) -> int:
    """About how many bytes of activations a prefill holds at its height."""
    inner = max(config.stack_of(i).intermediate_size for i in range(config.num_hidden_layers))
    width = INNER_ROWS * inner + MODEL_ROWS * config.hidden_size
    return batch * columns * width * dtype.itemsize


def _layer_bytes(layer: object) -> int:
    """Of one of transformers' cache layers, whichever kind it is."""
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        tensors += getattr(layer, name, {}).values()
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
