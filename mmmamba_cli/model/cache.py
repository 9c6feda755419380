"""Decoding caches: transformers' cache layers plus the decoding state of both stacks.

Keys, values, conv and SSM states live in transformers' cache layers. A `DecodingState` holds the
rest: the columns each stack has seen (they differ if the pixel shuffle sits between the stacks),
the positions of images, and the RoPE frequencies fixed at prefill. Legend: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmmamba_cli.errors import DataError, MmmambaError, name_some
from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.image_tokens import Expansion, ImageColumns
from mmmamba_cli.model.sequence_layout import StackState

# Name of the cache in transformers' outputs and in `generate`: "cache" since 5.24,
# "past_key_values" before.
CACHE_NAME = (
    "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
)

NO_ROLLBACK = (
    "a recurrent state holds only its last column and cannot be taken back to an earlier one"
)
CROPPABLE_LAYERS = (DynamicLayer, StaticLayer)
ROLLBACK_HINT = "keep a copy of the cache (copy.deepcopy), or use a model of attention layers alone"


@dataclass
class DecodingState:
    """Columns seen so far by the embedding stack and by the language stack.

    `images` marks those that belong to images, None without images. `static_columns` is the
    capacity of a static cache in columns of the language stack, None for a dynamic cache.
    """

    embedding: StackState = field(default_factory=StackState)
    language: StackState = field(default_factory=StackState)
    images: ImageColumns | None = None
    static_columns: int | None = None

    def count_row_tiles(self) -> Tensor | None:
        """Number of tiles seen in each row, (B,) or (1,); None before the first call."""
        if self.language.length == 0:
            return None
        if self.images is None:
            return torch.zeros(1, dtype=torch.long)
        return self.images.count_row_tiles()

    def record_images(
        self, is_image: Tensor, tokens_per_tile: int, expansion: Expansion | None
    ) -> None:
        """Record the image tokens (B, T) of a call, before `next_layout` advances the state."""
        length, embedding_length = self.language.length, self.embedding.length
        if self.images is None:
            nothing = is_image[:, :0]
            empty = None if expansion is None else nothing.long()
            self.images = ImageColumns(tokens_per_tile, nothing, empty, empty)
        self.images.extend(is_image, expansion, length, embedding_length)

    def select_rows(self, rows: Tensor) -> None:
        """Keep, reorder or repeat the rows of the batch."""
        self.embedding.select_rows(rows)
        self.language.select_rows(rows)
        if self.images is not None:
            self.images.select_rows(rows)

    def count_embedding_columns(self, columns: int) -> int:
        """Columns of the embedding stack that the first `columns` columns correspond to.

        Raises:
            DataError: they end within an image, or rows differ in this number.
        """
        if self.images is None:
            return columns if self.embedding.length else 0
        length, embedding_length = self.language.length, self.embedding.length
        return self.images.count_embedding_columns(columns, length, embedding_length)

    def crop(self, columns: int) -> None:
        """Keep the first `columns` columns; the state is unchanged if this raises `DataError`."""
        if columns == 0:
            self.reset()
            return
        embedding_columns = self.count_embedding_columns(columns)
        self.embedding.crop(embedding_columns)
        self.language.crop(columns)
        if self.images is not None:
            self.images.crop(columns)

    def reset(self) -> None:
        """Forget all columns; the capacity of a static cache stays."""
        self.embedding, self.language, self.images = StackState(), StackState(), None


class HybridCache(Cache):
    """A transformers cache with the decoding state of both stacks.

    A plain `DynamicCache` cannot report its length, which `generate` reads at prefill, if every
    layer is linear attention; this one takes it from the decoding state. Each method that changes
    the layers also changes the decoding state, or raises `MmmambaError`.

    Raises:
        DataError: the layers of `inner` hold other columns than its decoding state, for example
            after keys and values were set by hand.
        MmmambaError: the layers record past states.
    """

    def __init__(self, inner: Cache):
        offloading = bool(getattr(inner, "offloading", False))
        super().__init__(
            layers=inner.layers,
            offloading=offloading,
            offload_only_non_sliding=bool(getattr(inner, "only_non_sliding", True)),
        )
        # A `DynamicCache` without a config adds layers on demand.
        self.layer_class_to_replicate = inner.layer_class_to_replicate
        self.decoding_state = decoding_state(inner)
        if any(getattr(layer, "record_past", False) for layer in self.layers):
            raise MmmambaError(NO_ROLLBACK, ROLLBACK_HINT)
        self._sync_with_layers()

    # False disables `generate`'s automatic compilation and keeps masks two-dimensional; CUDA graphs
    # are captured by `mmmamba_cli.inference`.
    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` is supported: all layers hold keys and values."""
        return all(type(layer) in CROPPABLE_LAYERS for layer in self.layers)

    @property
    def rows(self) -> int | None:
        """Batch size; None before the first call."""
        found = (_rows(layer) for layer in self.layers)
        return next((rows for rows in found if rows is not None), None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen by the language stack, padding included."""
        return self.decoding_state.language.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Capacity of a static cache in columns of the language stack; -1 for a dynamic cache."""
        columns = self.decoding_state.static_columns
        return -1 if columns is None else columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys of a language-stack layer for `query_length` queries, and their offset."""
        columns = self.decoding_state.static_columns
        return self.get_seq_length() + query_length if columns is None else columns, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -n columns for a negative n; keep the first n for a positive n.

        0 and an n beyond the length remove nothing.

        Raises:
            MmmambaError: layers with a recurrent state or with quantized keys.
            DataError: more columns than the cache holds, or an end within an image.
        """
        # `generate` passes a tensor in some versions of transformers.
        length, tokens_to_remove = self.get_seq_length(), int(tokens_to_remove)
        columns = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if columns >= length:
            return
        if self._recurrent_layers:
            raise MmmambaError(NO_ROLLBACK, ROLLBACK_HINT)
        if not self.is_croppable:
            kinds = {type(layer) for layer in self.layers} - set(CROPPABLE_LAYERS)
            names = name_some(sorted(kind.__name__ for kind in kinds))
            raise MmmambaError(
                f"a cache of {names} cannot be cropped",
                "take a DynamicCache or a StaticCache",
            )
        if columns < 0:
            raise DataError(
                f"the cache holds {length} columns, {-tokens_to_remove} cannot be removed"
            )
        embedding = self.decoding_state.embedding.length
        self.decoding_state.crop(columns)
        state = self.decoding_state
        for layer in self.layers:
            found = int(layer.get_seq_length())
            kept = state.embedding.length if found == embedding else state.language.length
            if isinstance(layer, StaticLayer):
                # Later columns are masked until they are overwritten.
                layer.cumulative_length.sub_(found - kept)
            else:
                layer.crop(kept - found)

    def activate_past_recording(self) -> None:
        """Do nothing for attention; raise `MmmambaError` if a layer has a recurrent state."""
        if self._recurrent_layers:
            raise MmmambaError(NO_ROLLBACK, ROLLBACK_HINT)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep, reorder or repeat the rows of the batch."""
        super().reorder_cache(beam_idx)
        for layer in self.layers:
            if hasattr(layer, "batch_size"):
                layer.batch_size = len(beam_idx)
        self.decoding_state.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times, as `repeat_interleave` does."""
        if self.rows is not None:
            self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, or where a (B,) bool tensor is True."""
        if self.rows is not None:
            self.reorder_cache(torch.arange(self.rows)[torch.as_tensor(indices).cpu()])

    def reset(self) -> None:
        """Forget all columns; a static cache keeps its memory."""
        super().reset()
        for layer in self.layers:
            if not hasattr(layer, "recurrent_states") and not hasattr(layer, "max_cache_len"):
                # Older versions of transformers do not shorten these.
                layer.keys = layer.values = None
                layer.is_initialized = False
        self.decoding_state.reset()

    def check_capacity(self, rows: int, columns: int) -> None:
        """Raise `DataError` unless `columns` more columns of `rows` rows fit."""
        if self.rows not in (None, rows):
            raise DataError(
                f"input_ids has {rows} rows, but the cache holds {self.rows}",
                "cache.batch_repeat_interleave or batch_select_indices makes the cache fit",
            )
        room, taken = self.decoding_state.static_columns, self.get_seq_length()
        if room is not None and taken + columns > room:
            raise DataError(
                f"the static cache has room for {room} columns, but {taken} are taken and "
                f"{columns} more were given",
                "make it with a larger max_length",
            )

    @property
    def _recurrent_layers(self) -> list[Any]:
        return [layer for layer in self.layers if hasattr(layer, "recurrent_states")]

    def _sync_with_layers(self) -> None:
        """Adjust the decoding state if the caller cropped or reset the layers directly."""
        state, recurrent = self.decoding_state, self._recurrent_layers
        found = {
            int(layer.get_seq_length()) for layer in self.layers if hasattr(layer, "get_seq_length")
        }
        is_used = any(any(layer.has_previous_state.values()) for layer in recurrent)
        if not is_used and found <= {0}:
            state.reset()
            return
        longest = max(state.embedding.length, state.language.length)
        if not found or found <= {state.embedding.length, state.language.length}:
            return
        columns = state.language.length - (longest - max(found))
        if not recurrent and 0 < columns < state.language.length:
            expected = {columns, state.count_embedding_columns(columns)}
            if found <= expected:
                state.crop(columns)
                return
        lengths = " and ".join(map(str, sorted(found)))
        raise DataError(
            f"the layers of the cache hold {lengths} columns, but {longest} passed through the "
            "model with it",
            "fill, crop and reset a cache of mmmamba_cli.model.new_cache, or the one that the "
            "model returned",
        )


def new_cache(config: HolisticVLMConfig, max_length: int | None = None) -> HybridCache:
    """Create a dynamic cache, or a static one with room for `max_length` columns."""
    if max_length is None:
        return HybridCache(DynamicCache(config=config))
    return HybridCache(StaticCache(config=config, max_cache_len=max_length))


def resolve_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache passed under either name; `ValueError` for two different caches."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument: give one")
    return past_key_values if cache is None else cache


def as_hybrid(cache: Cache | None) -> HybridCache | None:
    """Wrap a transformers cache as a `HybridCache`; return one unchanged."""
    return cache if cache is None or isinstance(cache, HybridCache) else HybridCache(cache)


def decoding_state(cache: Cache) -> DecodingState:
    """Return the decoding state of `cache`, created on first use.

    It is stored as an attribute, so that the model accepts any transformers cache.
    """
    state = getattr(cache, "decoding_state", None)
    if state is None:
        rooms = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len")]
        state = DecodingState(static_columns=min(rooms, default=None))
        cache.decoding_state = state
    return state


def read_ssm_state(cache: Cache | None, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """Conv state (B, channels, W - 1) and SSM state (B, H, P, N) of a layer; None before use."""
    if cache is None:
        return None, None
    layer = cache.layers[layer_idx]
    if not layer.has_previous_state[0]:
        return None, None
    return layer.conv_states[0], layer.recurrent_states[0]


def write_ssm_state(
    cache: Cache | None, layer_idx: int, conv_state: Tensor, ssm_state: Tensor
) -> None:
    """Store the states after the last column; do nothing without a cache."""
    if cache is None:
        return
    # The layer keeps the last columns, so a state of full width replaces the stored one.
    cache.update_conv_state(conv_state, layer_idx)
    cache.update_recurrent_state(ssm_state, layer_idx)


def widen_static_layers(cache: Cache, num_layers: int, extra_columns: int) -> None:
    """Give the first `num_layers` layers of a static cache room for `extra_columns` new columns.

    With the pixel shuffle between the stacks, the embedding stack sees every patch, while the
    length of a static cache counts merged tokens. Stored keys and values are kept.
    """
    state = decoding_state(cache)
    if state.static_columns is None:
        return
    columns = state.static_columns + extra_columns
    columns += state.embedding.length - state.language.length
    for layer in cache.layers[:num_layers]:
        more = columns - getattr(layer, "max_cache_len", columns)
        if more <= 0:
            continue
        layer.max_cache_len = columns
        if layer.is_initialized:
            layer.keys = F.pad(layer.keys, (0, 0, 0, more))
            layer.values = F.pad(layer.values, (0, 0, 0, more))


def _rows(layer: Any) -> int | None:
    """Batch size of a cache layer; None before the first call."""
    found = layer.recurrent_states[0] if hasattr(layer, "recurrent_states") else layer.keys
    return None if found is None or found.dim() != 4 else len(found)
