"""Padding and packing of a call, for the mixers of its layers.

transformers gives a layer no mask of columns: attention gets a mask of queries and keys, or none.
So a hook on the root keeps the two-dimensional mask of the call. Legend: B batch, S columns seen
before, T columns of this call, P head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mmmamba_cli.errors import DataError
from mmmamba_cli.model.sequence_layout import SequenceLayout, packed_sequences
from mmmamba_cli.ops.attention import VarlenMetadata, varlen_metadata


@dataclass
class CallInputs:
    """What a call of the model was given.

    `attention_mask` is (B, S + T), `position_ids` (B or 1, T); None where the caller gave none.
    `host_mask` and `host_positions` are the same on the CPU, if they are known: reading them waits
    for no GPU.
    """

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    host_mask: Tensor | None = None
    host_positions: Tensor | None = None
    _masks: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    _seq_idx: dict[int, Tensor | None] = field(default_factory=dict)
    _varlen: dict[tuple[int, int, torch.device], VarlenMetadata | None] = field(
        default_factory=dict
    )

    def masks(self, past: int, length: int) -> tuple[Tensor | None, Tensor | None]:
        """(B, T) of this call's columns and (B, S + T) of all, bool; None without padding.

        Raises:
            DataError: the mask has fewer columns.
        """
        if (past, length) not in self._masks:
            self._masks[past, length] = self._cut_masks(past, length)
        return self._masks[past, length]

    def _cut_masks(self, past: int, length: int) -> tuple[Tensor | None, Tensor | None]:
        mask = self.attention_mask
        if mask is None:
            return None, None
        if mask.shape[1] < past + length:
            raise DataError(
                f"attention_mask has {mask.shape[1]} columns, but {past} are in the cache and "
                f"{length} were given",
                "give a mask of all columns, those in the cache included",
            )
        every = mask[:, : past + length].bool()
        own = every[:, past:]
        if not torch.compiler.is_compiling():
            known = every if self.host_mask is None else self.host_mask[:, : past + length].bool()
            if bool(known.all()):
                return None, None
            if bool(known[:, past:].all()):
                return None, every
        return own, every

    def seq_idx(self, batch: int) -> Tensor | None:
        """(B, T) ids of the sequences packed into each row; None for one sequence.

        As attention in transformers, which looks for packing only without a mask and a cache.
        """
        if self.attention_mask is not None or self.position_ids is None:
            return None
        if batch not in self._seq_idx:
            known = self.position_ids if self.host_positions is None else self.host_positions
            self._seq_idx[batch] = packed_sequences(self.position_ids.expand(batch, -1), known)
        return self._seq_idx[batch]

    def varlen(self, batch: int, length: int, device: torch.device) -> VarlenMetadata | None:
        """The sequences of padded or packed rows without a cache, on `device`.

        None if values on the CPU are not known.
        """
        key = (batch, length, device)
        if key not in self._varlen:
            found = self._known_varlen(batch, length)
            if found is not None:
                ends = found.cu_seqlens.to(device, non_blocking=True)
                found = found._replace(cu_seqlens=ends)
            self._varlen[key] = found
        return self._varlen[key]

    def _known_varlen(self, batch: int, length: int) -> VarlenMetadata | None:
        if self.host_mask is not None:
            return varlen_metadata(self.host_mask[:, :length], None)
        if self.host_positions is None:
            return None
        return varlen_metadata(None, packed_sequences(self.host_positions.expand(batch, -1)))


class CallContext:
    """The inputs of the calls of one model, kept by hooks on its root and inner models.

    The outermost hooked module that is called counts, since an inner one is given the mask of
    queries and keys. A layer that is recomputed for its gradients (activation checkpointing) runs
    after its call and perhaps after another; its RoPE angles then tell which call it belongs to.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._latest = CallInputs()
        self._calls: Any = WeakIdKeyDictionary()
        self._on_host: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[CallContext], tuple[()]]:
        """Implement `copy.deepcopy` and pickle: a copied model has no calls yet."""
        return CallContext, ()

    def attach(self, *modules: nn.Module) -> Callable[[], None]:
        """Hook `modules`, outer ones and inner ones, and return a function that unhooks them."""
        handles = []
        for module in modules:
            handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            handles.append(module.register_forward_hook(self._end, always_call=True))

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def remember(self, given: Tensor, on_host: Tensor) -> None:
        """Read `on_host` wherever values of its copy on a device are needed.

        Args:
            given: `attention_mask` or `position_ids` of the next calls.
            on_host: the same on the CPU.
        """
        if given is not on_host:
            self._on_host[given] = on_host

    def inputs(self, cos: Tensor | None = None) -> CallInputs:
        """The inputs of the call with the RoPE angles `cos`."""
        if cos is None:
            return self._latest
        if self._depth and cos not in self._calls:
            self._calls[cos] = self._latest
        found: CallInputs = self._calls.get(cos, self._latest)
        return found

    def layout(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        *,
        past: int = 0,
        is_cached: bool = False,
        uses_rope: bool = False,
    ) -> SequenceLayout:
        """The layout of the columns of `hidden` (B, T, D) behind `past` columns.

        `angles` are the cosine and sine (B, T, P) that the model gives its attention, those of
        multimodal RoPE included. They are kept only where a mixer `uses_rope`.

        Raises:
            DataError: the mask of the call has fewer columns.
        """
        batch, length, _ = hidden.shape
        inputs = self.inputs(None if angles is None else angles[0])
        mask, key_mask = (_to(one, hidden.device) for one in inputs.masks(past, length))
        seq_idx = None if is_cached else _to(inputs.seq_idx(batch), hidden.device)
        cos = sin = hidden.new_empty(1, length, 0)
        if uses_rope and angles is not None:
            cos, sin = angles
        # Only attention to a window reads it, and that has RoPE.
        reads_varlen = uses_rope and not past and (mask is not None or seq_idx is not None)
        varlen = inputs.varlen(batch, length, hidden.device) if reads_varlen else None
        return SequenceLayout(cos, sin, past, mask, seq_idx, key_mask, seq_idx, varlen)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth == 1:
            names = list(inspect.signature(module.forward).parameters)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self._latest = call_inputs(given)
            known = (given.get(name) for name in ("attention_mask", "position_ids"))
            mask, positions = (None if one is None else self._on_host.get(one) for one in known)
            self._latest.host_mask, self._latest.host_positions = mask, _text_positions(positions)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1


def call_inputs(given: dict[str, Any]) -> CallInputs:
    """The inputs that mixers need among the arguments of a model's forward.

    Raises:
        DataError: a mask that is not of columns.
    """
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise DataError(
            f"attention_mask has {found}, expected (batch, columns): recurrent mixers need to know "
            "which columns are padding",
            "give the mask that the processor or the tokenizer returns",
        )
    return CallInputs(mask, _text_positions(positions))


def _text_positions(positions: Tensor | None) -> Tensor | None:
    """(B or 1, T); None where positions do not count text."""
    if positions is not None and positions.dim() == 3:
        # Of multimodal positions, the first of four rows counts text; three rows jump at images.
        return positions[0] if positions.shape[0] == 4 else None
    return positions


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
