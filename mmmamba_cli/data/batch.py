"""What a training loop is given: micro batches, and what could not be read.

Legend: B rows, T columns, N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError

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
    pixel_values: (N, 3, S, S) float32, tiles in the order of the rows; None without images.
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

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            attention_mask=_to(self.attention_mask, device),
            seq_idx=_to(self.seq_idx, device),
            pixel_values=_to(self.pixel_values, device),
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


def _to(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
