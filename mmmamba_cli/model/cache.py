"""What decoding remembers: transformers' own layer caches, plus a little of our own.

Keys, values, conv and SSM states live in transformers' cache layers. Two things they cannot know
are kept beside them in a `DecodingState`: the columns each of the two stacks has seen (they differ
when the pixel shuffle sits between the stacks) and the RoPE frequencies fixed at prefill.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.sequence import StackState


@dataclass
class DecodingState:
    """Columns seen so far, for the embedding stack and for the language stack."""

    embedding: StackState = field(default_factory=StackState)
    language: StackState = field(default_factory=StackState)

    def select_rows(self, rows: Tensor) -> None:
        self.embedding.select_rows(rows)
        self.language.select_rows(rows)


class HybridCache(Cache):
    """A cache around transformers' layers that counts tokens itself.

    A plain `DynamicCache` cannot say its length when every layer is linear attention, which
    `generate` asks at prefill; this one knows it from the decoding state.
    """

    def __init__(self, inner: Cache):
        offloading = bool(getattr(inner, "offloading", False))
        super().__init__(
            layers=inner.layers,
            offloading=offloading,
            offload_only_non_sliding=bool(getattr(inner, "only_non_sliding", True)),
        )
        self.decoding_state = decoding_state(inner)

    # Graphs are captured by our own decoder, not by `generate`'s automatic compilation, and masks
    # stay two-dimensional: both follow from this answer.
    @property
    def is_compileable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns the language stack has seen, padding included."""
        return self.decoding_state.language.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.decoding_state.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError(
            "repeat the prompts instead: SSM states are not repeated in place"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("use reorder_cache: SSM states are selected there")

    def reset(self) -> None:
        super().reset()
        self.decoding_state.embedding = StackState()
        self.decoding_state.language = StackState()


def new_cache(config: HolisticVLMConfig, max_length: int | None = None) -> HybridCache:
    """A fresh cache: growing, or static with room for `max_length` columns."""
    if max_length is None:
        return HybridCache(DynamicCache(config=config))
    return HybridCache(StaticCache(config=config, max_cache_len=max_length))


def decoding_state(cache: Cache) -> DecodingState:
    """The decoding state that belongs to `cache`, made on first use.

    It is an attribute of the cache, so that any transformers cache can be handed to the model.
    """
    state = getattr(cache, "decoding_state", None)
    if state is None:
        state = DecodingState()
        cache.decoding_state = state
    return state


def read_ssm_state(cache: Cache | None, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """Conv state (B, channels, W - 1) and SSM state (B, H, P, N) of a layer, or None and None."""
    if cache is None:
        return None, None
    layer = cache.layers[layer_idx]
    if not layer.has_previous_state[0]:
        return None, None
    return layer.conv_states[0], layer.recurrent_states[0]


def write_ssm_state(
    cache: Cache | None, layer_idx: int, conv_state: Tensor, ssm_state: Tensor
) -> None:
    """Store the states after the last column."""
    if cache is None:
        return
    # A state as wide as the one stored replaces it: the layer keeps the last columns it is given.
    cache.update_conv_state(conv_state, layer_idx)
    cache.update_recurrent_state(ssm_state, layer_idx)


def widen_static_layers(cache: Cache, num_layers: int, extra_columns: int) -> None:
    """Give the first `num_layers` layers of an unused static cache room for more columns.

    With the pixel shuffle between the stacks the embedding stack sees every patch, while the
    length a static cache is made for counts merged tokens.
    """
    for layer in cache.layers[:num_layers]:
        if hasattr(layer, "max_cache_len"):
            layer.max_cache_len += extra_columns
            layer.is_initialized = False
