"""Micro batches, and the samples that could not be read.

Legend: B rows, T columns, N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from mmmamba_cli.data.generated_corpus import Drawings
from mmmamba_cli.errors import DataError
from mmmamba_cli.ops.attention import VarlenMetadata
from mmmamba_cli.processing import normalize

# Label of a token that is not part of an answer; the losses of PyTorch ignore it.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used; `name` is, for example, `set.jsonl:17`.

    `seen_by_all` tells whether every process found the problem, or only this one.
    """

    name: str
    reason: str
    seen_by_all: bool = True


def bad_sample(error: DataError, name: str, seen_by_all: bool = True) -> BadSample:
    """The sample `name` with the message of `error`, without a leading name."""
    return BadSample(name, error.message.removeprefix(f"{name}: "), seen_by_all)


@dataclass(frozen=True)
class Batch:
    """One micro batch of one process, right-padded.

    input_ids: (B, T) int64.
    labels: (B, T) int64, not shifted; the token id in answers, else IGNORE_INDEX.
    attention_mask: (B, T) bool, False for padding; None without padding.
    seq_idx: (B, T) int64, index of the sample within its row; None if each row holds one sample.
    varlen: boundaries of samples and padding in the flattened rows; None without padding and
        packing. Computed on the CPU: computing them on a GPU synchronizes.
    pixel_values: (N, 3, S, S) tiles in row order; None without images. uint8 from the loader,
        normalised float32 after `to`.
    drawings: the pictures in place of `pixel_values` if the corpus draws them; `to` draws them.
    num_tokens: number of tokens without padding.
    on_host: the batch that `to` moved here from the CPU, where reading values waits for no GPU.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    seq_idx: Tensor | None
    pixel_values: Tensor | None
    num_samples: int
    num_tokens: int
    names: tuple[str, ...] = ()
    varlen: VarlenMetadata | None = None
    drawings: Drawings | None = None
    on_host: Batch | None = None

    @property
    def token_mask(self) -> Tensor:
        """(B, T) bool, True for the tokens of samples."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()

    def to(self, device: torch.device | str) -> Batch:
        """Move the tensors to `device`; draw and normalise the pixels there."""
        # The stream orders the copy from pinned memory before later kernels.
        non_blocking = torch.device(device).type == "cuda"
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if self.input_ids.device.type == "cpu" and moved.input_ids.device.type != "cpu":
            moved = replace(moved, on_host=self)
        pixels = moved.pixel_values
        if moved.drawings is not None:
            pixels = moved.drawings.draw(moved.input_ids.device)
        if pixels is None or pixels.dtype != torch.uint8:
            return moved
        return replace(moved, pixel_values=normalize(pixels), drawings=None)

    def pin_memory(self) -> Batch:
        """Copy the tensors to pinned memory, from which copies to a GPU are asynchronous."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            attention_mask=changed(self.attention_mask),
            seq_idx=changed(self.seq_idx),
            pixel_values=changed(self.pixel_values),
            varlen=(
                None
                if self.varlen is None
                else self.varlen._replace(cu_seqlens=change(self.varlen.cu_seqlens))
            ),
        )


class MicroBatch(Protocol):
    """What the training loop asks of a micro batch, `Batch` or `ModelBatch`."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def to(self, device: torch.device | str) -> Self: ...

    def pin_memory(self) -> Self: ...


MicroT = TypeVar("MicroT", bound=MicroBatch)


@dataclass(frozen=True)
class StepBatches(Generic[MicroT]):
    """The micro batches of one optimiser step on one process.

    `num_planned` is the number of samples of the global batch, including the unreadable ones.
    """

    step: int
    micro_batches: tuple[MicroT, ...]
    bad: tuple[BadSample, ...]
    num_planned: int

    def pin_memory(self) -> StepBatches:
        """Pin all micro batches; torch's `DataLoader` calls this method by its name."""
        return replace(
            self, micro_batches=tuple(micro.pin_memory() for micro in self.micro_batches)
        )

    def drawn_by(self, to_pixels: Callable[[Any, torch.device], Tensor]) -> StepBatches:
        """Set the function that draws pictures: it does not travel from the loader processes."""

        def complete(micro: Any) -> Any:
            if not isinstance(micro, Batch) or micro.drawings is None:
                return micro
            return replace(micro, drawings=replace(micro.drawings, to_pixels=to_pixels))

        return replace(self, micro_batches=tuple(map(complete, self.micro_batches)))
