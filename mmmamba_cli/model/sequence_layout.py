"""Sequence layout of a batch: RoPE angles, padding masks, packed sequences, past length.

A *column* is one position along the time axis of a batch, padding included. Legend: B batch,
T columns of this call, S columns seen before, P head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.model.config import StackConfig
from mmmamba_cli.model.rope import depends_on_length, inverse_frequencies, rope_cos_sin
from mmmamba_cli.model.tiles import split_columns, tiles_in_chunk, uncut_columns
from mmmamba_cli.ops.attention import VarlenMetadata, varlen_metadata


@dataclass
class StackState:
    """Decoding state of one stack, without its keys, values and SSM states."""

    length: int = 0
    # (B, length) bool, True at real tokens; None while no padding was seen.
    mask: Tensor | None = None
    # (B or 1, 1) position of the next token; None while it equals `length` in every row.
    next_position: Tensor | None = None
    # Whether the caller passed position_ids, and whether the next call must pass them.
    uses_position_ids: bool = False
    needs_position_ids: bool = False
    # RoPE inverse frequencies, fixed by the first prompt.
    inv_freq: Tensor | None = None

    def select_rows(self, rows: Tensor) -> None:
        """Keep, reorder or repeat the rows of the batch (beam search)."""
        for name in ("mask", "next_position"):
            value = getattr(self, name)
            # A position shared by all rows stays shared.
            if value is not None and (name == "mask" or len(value) > 1):
                setattr(self, name, value.index_select(0, rows.to(value.device)))
        if self.inv_freq is not None and self.inv_freq.dim() > 1 and self.inv_freq.shape[0] > 1:
            self.inv_freq = self.inv_freq.index_select(0, rows.to(self.inv_freq.device))

    def crop(self, columns: int) -> None:
        """Keep the first `columns` columns and the prompt's RoPE frequencies.

        Positions passed by the caller are not stored, so the next call must pass position_ids too.
        """
        self.needs_position_ids = self.uses_position_ids
        if self.mask is not None:
            if self.next_position is not None:
                removed = self.mask[:, columns:].sum(1, keepdim=True)
                self.next_position = self.next_position - removed
            self.mask = self.mask[:, :columns]
        self.length = columns


@dataclass(frozen=True)
class SequenceLayout:
    """Layout of T columns of a batch in one stack.

    `cos` and `sin` (B, T, P) are RoPE angles, `past` is S. `mask` (B, T) bool is True at real
    tokens (None: no padding); `seq_idx` (B, T) numbers packed sequences (None: one per row).
    `key_mask` and `key_seq_idx` (B, S + T) hold the same for all keys of attention.
    """

    cos: Tensor
    sin: Tensor
    past: int
    mask: Tensor | None = None
    seq_idx: Tensor | None = None
    key_mask: Tensor | None = None
    key_seq_idx: Tensor | None = None
    # The sequences of `mask` and `seq_idx`, if the caller computed them.
    precomputed_varlen: VarlenMetadata | None = None
    # (N, g, g) flat indices into the (B * T) columns: the tiles of the call, if a layer reads them.
    tiles: Tensor | None = None

    @property
    def length(self) -> int:
        return self.cos.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SequenceLayout:
        """Copy the tensors to `device`, once for each device.

        accelerate calls this for every layer of a model that is spread over devices.
        """
        device = torch.device(device)
        if self.cos.device == device:
            return self
        if device not in self._device_copies:
            tensors: dict[str, Any] = {
                name: value.to(device, non_blocking=non_blocking)
                for name, value in vars(self).items()
                if isinstance(value, Tensor) and name in self.__dataclass_fields__
            }
            self._device_copies[device] = replace(self, **tensors)
        return self._device_copies[device]

    @cached_property
    def _device_copies(self) -> dict[torch.device, SequenceLayout]:
        return {}

    def split(self, size: int) -> list[slice]:
        """The columns in chunks of up to `size`; a cut within a tile moves to the tile's begin.

        Raises:
            DataError: `size` is smaller than a tile, or than tiles that overlap across rows.
        """
        return split_columns(self.length, size, self._uncut)

    @property
    def min_chunk(self) -> int:
        """The smallest `size` that `split` accepts."""
        return max((end - begin for begin, end in self._uncut), default=1)

    @cached_property
    def _uncut(self) -> list[tuple[int, int]]:
        return [] if self.tiles is None else uncut_columns(self.tiles, self.length)

    def chunk(self, start: int, stop: int) -> SequenceLayout:
        """Slice columns `start` to `stop`; earlier columns become the past.

        Raises:
            ValueError: the chunk cuts a tile; `split` gives chunks that do not.
        """
        if start == 0 and stop >= self.length:
            return self
        stop, tiles = min(stop, self.length), self.tiles
        if tiles is not None:
            tiles = tiles_in_chunk(tiles, self.length, start, stop)
        return replace(
            self,
            cos=self.cos[:, start:stop],
            sin=self.sin[:, start:stop],
            past=self.past + start,
            mask=None if self.mask is None else self.mask[:, start:stop],
            seq_idx=None if self.seq_idx is None else self.seq_idx[:, start:stop],
            precomputed_varlen=None,
            tiles=tiles,
        )

    def is_plain_causal(self, num_keys: int) -> bool:
        """Whether `is_causal=True` is enough: a whole prefill without padding or packing."""
        return (
            self.past == 0
            and num_keys == self.length
            and self.key_mask is None
            and self.key_seq_idx is None
        )

    def varlen(self, num_keys: int) -> VarlenMetadata | None:
        """Return the sequences of padded or packed columns for variable-length attention.

        None with past columns, without padding and packing, and in a compiled graph, which cannot
        branch on the number of sequences; attention then takes a mask.
        """
        if torch.compiler.is_compiling():
            return None
        if self.past or num_keys != self.length or (self.mask is None and self.seq_idx is None):
            return None
        return self._varlen

    @cached_property
    def _varlen(self) -> VarlenMetadata | None:
        """Cached for the other layers of the stack."""
        if self.precomputed_varlen is not None:
            return self.precomputed_varlen
        return varlen_metadata(self.mask, self.seq_idx)

    def attention_mask(self, num_keys: int) -> Tensor | None:
        """(B or 1, 1, T, num_keys) bool, True where a query attends to a key; None for no mask.

        `num_keys` is S + T, or the capacity of a static cache, whose unused end is masked.
        """
        if self.length == 1 and num_keys == self.past + 1 and self.key_mask is None:
            return None
        # torch.compile does not trace the lock of a cached property.
        if num_keys == self.past + self.length and not torch.compiler.is_compiling():
            return self._cached_attention_mask
        return self._attention_mask(num_keys)

    @cached_property
    def _cached_attention_mask(self) -> Tensor:
        """The mask over S + T keys, cached for the other layers of the stack."""
        return self._attention_mask(self.past + self.length)

    def _attention_mask(self, num_keys: int) -> Tensor:
        queries = torch.arange(self.past, self.past + self.length, device=self.cos.device)
        keys = torch.arange(num_keys, device=self.cos.device)
        allowed = (keys[None, :] <= queries[:, None])[None]
        known = self.past + self.length
        if self.key_mask is not None:
            real = self.key_mask[:, : min(known, num_keys)]
            real = torch.nn.functional.pad(real, (0, num_keys - real.shape[1]))
            # A padding query attends to itself: softmax over no key would be NaN.
            allowed = allowed & (real[:, None, :] | (keys[None, :] == queries[:, None])[None])
        if self.key_seq_idx is not None:
            ids = self.key_seq_idx
            allowed = allowed & (ids[:, self.past : known, None] == ids[:, None, :num_keys])
        return allowed.unsqueeze(1)

    def visible_keys(self) -> Tensor:
        """(B or 1, 1, T, T) bool, True where a query attends to a key of the same call."""
        mask = self.attention_mask(self.length)
        if mask is None:
            mask = torch.ones(1, 1, self.length, self.length, dtype=torch.bool).tril()
        return mask.to(self.cos.device)


def next_layout(
    stack: StackConfig,
    state: StackState,
    num_columns: int,
    *,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    prompt_lengths: Tensor | None,
    position_ids: Tensor | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> SequenceLayout:
    """Return the layout of the next `num_columns` columns and advance `state` past them.

    `mask` and `seq_idx` are (B, T), of these columns only. `prompt_lengths` (B,) fixes the RoPE
    base of dynamic NTK; by default each row's length at the first call does. `position_ids`
    (B or 1, T) replaces positions counted from the mask.

    Raises:
        DataError: the next position is unknown and `position_ids` is None.
    """
    past = state.length
    if position_ids is None and state.needs_position_ids:
        raise DataError(
            "the cache was filled with position_ids and cropped since, so the next position is "
            "not known",
            "pass position_ids",
        )
    positions, lengths = _positions(state, num_columns, mask, seq_idx, device)
    bound: int | None = past + num_columns
    if position_ids is not None:
        positions = position_ids.to(device)
        state.uses_position_ids, state.needs_position_ids = True, False
        state.next_position = positions.amax(1, keepdim=True) + 1
        lengths, bound = torch.maximum(lengths, state.next_position), None
    if state.inv_freq is None:
        if prompt_lengths is not None:
            lengths, bound = prompt_lengths.to(device).unsqueeze(1), None
        state.inv_freq = _frequencies(stack, lengths, bound)
    key_mask = _extend_mask(state, num_columns, mask)
    cos, sin = rope_cos_sin(positions, state.inv_freq, dtype)
    state.length, state.mask = past + num_columns, key_mask
    return SequenceLayout(cos, sin, past, mask, seq_idx, key_mask, seq_idx)


def _frequencies(stack: StackConfig, lengths: Tensor, bound: int | None) -> Tensor:
    """RoPE frequencies for `lengths`, shared by all rows if `bound`, their maximum, allows it."""
    short = bound is not None and bound <= stack.max_position_embeddings
    if short or not depends_on_length(stack):
        return inverse_frequencies(stack, 0, lengths.device)
    return inverse_frequencies(stack, lengths, lengths.device)


def _extend_mask(state: StackState, num_columns: int, mask: Tensor | None) -> Tensor | None:
    if mask is None and state.mask is None:
        return None
    if state.length == 0:
        return mask
    if mask is None:
        assert state.mask is not None
        mask = state.mask.new_ones((state.mask.shape[0], num_columns))
    before = state.mask
    if before is None:
        before = mask.new_ones((mask.shape[0], state.length))
    return torch.cat((before, mask), dim=1)


def _positions(
    state: StackState,
    num_columns: int,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Positions (B or 1, T), and the sequence lengths (B or 1, 1) or (B, T) for RoPE."""
    if mask is None and seq_idx is None and state.next_position is None:
        positions = torch.arange(state.length, state.length + num_columns, device=device)[None]
        return positions, torch.full((1, 1), state.length + num_columns, device=device)
    like = mask if mask is not None else seq_idx
    rows = like.shape[0] if like is not None else state.next_position.shape[0]  # type: ignore[union-attr]
    real = torch.ones(rows, num_columns, dtype=torch.long, device=device)
    if mask is not None:
        real = mask.long()
    counted = real.cumsum(1)
    if seq_idx is not None:
        return _packed_positions(real, counted, seq_idx)
    start = state.next_position
    if start is None:
        start = torch.full((rows, 1), state.length, device=device)
    positions = (start + counted - 1).clamp(min=0)
    state.next_position = start + counted[:, -1:]
    return positions, state.next_position


def _packed_positions(real: Tensor, counted: Tensor, seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that restart in each packed sequence, and its length at every column, (B, T)."""
    boundary = torch.zeros_like(real, dtype=torch.bool)
    boundary[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    before = counted - real
    start = torch.where(boundary, before, 0).cummax(1).values
    ordinal = boundary.long().cumsum(1)
    lengths = torch.zeros_like(real).scatter_add(1, ordinal, real).gather(1, ordinal)
    return (counted - 1 - start).clamp(min=0), lengths


def packed_sequences(position_ids: Tensor | None, on_host: Tensor | None = None) -> Tensor | None:
    """Derive (B, T) sequence ids from positions that restart; None for one sequence per row.

    Collators that pack sequences without padding describe them by `position_ids` alone. `on_host`
    are the same positions on the CPU, if known, where reading values waits for no GPU.
    """
    if position_ids is None or position_ids.shape[1] < 2:
        return None
    # A compiled graph cannot branch on values, so one sequence per row gets ids too.
    if not torch.compiler.is_compiling():
        read = position_ids if on_host is None else on_host
        if not bool((read.diff(dim=1) != 1).any()):
            return None
    begins = torch.zeros_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    return begins.long().cumsum(1)
