"""Micro batches for models of transformers: the arguments of a forward pass, and labels.

Legend: B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmmamba_cli.data.batch import IGNORE_INDEX


@dataclass(frozen=True)
class ModelBatch:
    """One micro batch of one process, as the processor of a family makes it, padded on the right.

    Attributes:
        inputs: keyword arguments of the model's forward, without labels. `input_ids` (B, T) int64
            and `attention_mask` (B, T), 0 for padding, are always there; pixels and grids are those
            of the family, in the order of the conversations. In float32 where they are not
            integers. A model takes packed rows with positions in place of the mask
            (`packed_position_ids`).
        labels: (B, T) int64, not shifted; the token id in answers, else IGNORE_INDEX.
        num_samples: number of samples. A batch without samples has one row, which counts nothing.
        num_tokens: number of tokens without padding.
        names: names of the samples.
        seq_idx: (B, T) int64, number of the conversation within its row, padding counted as one
            more; None if each row holds one conversation.
        on_host: the batch that `to` moved here from the CPU, where reading values waits for no GPU.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    num_samples: int
    num_tokens: int
    names: tuple[str, ...] = ()
    seq_idx: Tensor | None = None
    on_host: ModelBatch | None = None

    @classmethod
    def empty(cls, pad_id: int) -> ModelBatch:
        """One column, for a process without rows, which takes part in collectives.

        The column is no padding for the model: attention over no key at all gives NaN.
        """
        ids = torch.full((1, 1), pad_id)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return cls(inputs, torch.full_like(ids, IGNORE_INDEX), num_samples=0, num_tokens=0)

    @property
    def token_mask(self) -> Tensor:
        """(B, T) bool, True for the tokens of samples."""
        mask = self.inputs["attention_mask"].bool()
        return mask if self.num_samples else torch.zeros_like(mask)

    def to(self, device: torch.device | str) -> ModelBatch:
        """Move the tensors to `device`."""
        # The stream orders the copy from pinned memory before later kernels.
        non_blocking = torch.device(device).type == "cuda"
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if self.labels.device.type == "cpu" and moved.labels.device.type != "cpu":
            return replace(moved, on_host=self)
        return moved

    def pin_memory(self) -> ModelBatch:
        """Copy the tensors to pinned memory, from which copies to a GPU are asynchronous."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> ModelBatch:
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        seq_idx = None if self.seq_idx is None else change(self.seq_idx)
        return replace(self, inputs=inputs, labels=change(self.labels), seq_idx=seq_idx)


def pack_conversations(batch: ModelBatch, rows: Sequence[Sequence[int]], pad_id: int) -> ModelBatch:
    """The batch with several conversations in a row.

    Inputs that are not of tokens (pixels, grids) stay as they are, so the conversations keep their
    order.

    Args:
        batch: one conversation in each row.
        rows: the conversations of each packed row: 0, 1, 2, ... over all rows.
        pad_id: token of the padding behind the last conversation of a row.
    """
    mask = batch.inputs["attention_mask"].bool()
    lengths = mask.sum(1).tolist()
    columns = max(sum(lengths[each] for each in row) for row in rows)

    def packed(value: Tensor, fill: int) -> Tensor:
        found = value.new_full((len(rows), columns), fill)
        for row, members in zip(found, rows, strict=True):
            tokens = torch.cat([value[each][mask[each]] for each in members])
            row[: len(tokens)] = tokens
        return found

    inputs = {
        name: packed(value, pad_id if name == "input_ids" else 0)
        if value.shape == mask.shape and not value.is_floating_point()
        else value
        for name, value in batch.inputs.items()
    }
    seq_idx = torch.stack(
        [
            torch.repeat_interleave(torch.tensor([*sizes, columns - sum(sizes)]))
            for sizes in ([lengths[each] for each in row] for row in rows)
        ]
    )
    labels = packed(batch.labels, IGNORE_INDEX)
    return replace(batch, inputs=inputs, labels=labels, seq_idx=seq_idx)
