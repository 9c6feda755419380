"""What a training loop is given: micro batches, and what could not be read.

Legend: B rows, T columns, N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.ops.attention import Segments
from mmmamba_cli.processing import normalize

# Label of a token that is not part of an answer.
IGNORED = -100


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used. `name` is like `set.jsonl:17`.

    `seen_by_all` says whether every process found it out, or only the one that names it here.
    """

    name: str
    reason: str
    seen_by_all: bool = True


def bad_sample(error: DataError, name: str, seen_by_all: bool = True) -> BadSample:
    """What `error`, which may begin with the name, says of sample `name`."""
    return BadSample(name, error.message.removeprefix(f"{name}: "), seen_by_all)


@dataclass(frozen=True)
class Batch:
    """One micro batch of one process; rows are padded on the right.

    input_ids: (B, T) int64.
    labels: (B, T) int64, the token itself where it belongs to an answer, else IGNORED; not shifted.
    attention_mask: (B, T) bool, False for padding; None if there is none.
    seq_idx: (B, T) int64, the number of the sample within its row; None if each row holds one.
    segments: where samples and padding begin in the rows laid end to end; None if there is neither
        padding nor packing. Attention takes packed rows by these, and finding them on a device
        would make the host wait for it.
    pixel_values: (N, 3, S, S), tiles in the order of the rows; None without images. uint8 as they
        come from the loader, and float32, normalised, once `to` has brought them to a device.
    num_tokens: tokens that are not padding.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    seq_idx: Tensor | None
    pixel_values: Tensor | None
    num_samples: int
    num_tokens: int
    names: tuple[str, ...] = ()
    segments: Segments | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`, pixels normalised there."""
        # A copy out of pinned memory need not be waited for; the GPU does things in order.
        early = torch.device(device).type == "cuda"
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=early))
        pixels = moved.pixel_values
        if pixels is None or pixels.dtype != torch.uint8:
            return moved
        return replace(moved, pixel_values=normalize(pixels))

    def pin_memory(self) -> Batch:
        """The same batch in memory that a GPU reads while the host goes on."""
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
            segments=(
                None
                if self.segments is None
                else self.segments._replace(bounds=change(self.segments.bounds))
            ),
        )


@dataclass(frozen=True)
class StepBatches:
    """The micro batches of one optimiser step on one process.

    `num_planned` is the number of samples the global batch was meant to have.
    """

    step: int
    micro: tuple[Batch, ...]
    bad: tuple[BadSample, ...]
    num_planned: int

    def pin_memory(self) -> StepBatches:
        """The same with pinned micro batches; torch's loader calls it by this name."""
        return replace(self, micro=tuple(micro.pin_memory() for micro in self.micro))
