"""The cache layer of a mixer in a cache that transformers made for the teacher.

transformers builds a cache from the teacher's `layer_types`, which a student keeps. So a mixer puts
its own layer in the place of the one of keys and values on first use.
Legend: B batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.model.cache import NO_ROLLBACK, ROLLBACK_HINT


class RecurrentSlot(LinearAttentionLayer, CacheLayerMixin):
    """The conv and recurrent states of one layer, which also counts columns as attention does.

    Lengths and mask sizes are those of keys and values, since transformers asks layer 0 for them.
    `capacity` is that of a static cache in columns, None for a dynamic one.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, capacity: int | None = None):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self.columns = 0
        self.capacity = capacity
        if capacity is not None:
            self.max_cache_len = capacity

    @property
    def is_compileable(self) -> bool:
        """Whether the cache is static, in which attention must mask the columns not yet filled.

        transformers leaves the mask of one query out where a layer is not.
        """
        return self.capacity is not None

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Raise `TypeError`: a mixer has no keys and values."""
        raise TypeError("this layer of the cache has recurrent states, and no keys and values")

    def advance(self, columns: int) -> None:
        """Count `columns` more columns.

        Raises:
            DataError: a static cache has no room for them.
        """
        if self.capacity is not None and self.columns + columns > self.capacity:
            raise DataError(
                f"the static cache has room for {self.capacity} columns, but {self.columns} are "
                f"taken and {columns} more were given",
                "make it with a larger max_cache_len",
            )
        self.columns += columns

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys and the first key of a layer of attention in the same cache."""
        return (self.columns + query_length if self.capacity is None else self.capacity), 0

    def get_max_length(self) -> int:
        return -1 if self.capacity is None else self.capacity

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep, reorder or repeat the rows of the batch."""
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = state.index_select(0, beam_idx.to(state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        state = self.recurrent_states[0]
        if state is not None:
            self.reorder_cache(torch.arange(len(state)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, or where a (B,) bool tensor is True."""
        state = self.recurrent_states[0]
        if state is not None:
            self.reorder_cache(torch.arange(len(state))[torch.as_tensor(indices).cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Raise `MmmambaError` unless nothing is removed: an earlier state is not kept."""
        if int(tokens_to_remove) != 0:
            raise MmmambaError(NO_ROLLBACK, ROLLBACK_HINT)

    def activate_past_recording(self) -> None:
        """Raise `MmmambaError`: a state cannot be taken back to an earlier token."""
        raise MmmambaError(NO_ROLLBACK, ROLLBACK_HINT)


def recurrent_slot(cache: Cache, layer_idx: int) -> RecurrentSlot:
    """The slot of layer `layer_idx`, put into `cache` on first use.

    Raises:
        DataError: the cache holds keys of this layer, so another model filled it.
    """
    make = cache.layer_class_to_replicate
    while make is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(make())
    layer = cache.layers[layer_idx]
    if isinstance(layer, RecurrentSlot):
        return layer
    if int(layer.get_seq_length()) > 0:
        raise DataError(
            f"layer {layer_idx} of the cache holds keys and values, but the model has a recurrent "
            "mixer there: another model filled the cache",
            "give a new cache",
        )
    capacities = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len")]
    slot = RecurrentSlot(max(capacities, default=None))
    cache.layers[layer_idx] = slot
    return slot
