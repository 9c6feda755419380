"""Sequence boundaries of padded and packed rows, for variable-length attention kernels.

Legend: B rows, T columns per row, N sequences of all rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class VarlenMetadata(NamedTuple):
    """Boundaries of N sequences in B rows of T columns, flattened to B * T columns.

    cu_seqlens: (N + 1,) int32; sequence n is columns cu_seqlens[n] to cu_seqlens[n + 1]. A run of
        padding counts as a sequence.
    max_seqlen: length of the longest sequence in columns.
    bounds: the values of cu_seqlens.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    bounds: tuple[int, ...]

    def mask(self, rows: int) -> Tensor:
        """The equivalent attention mask (B, 1, T, T) bool, True where a query may attend."""
        columns = torch.arange(int(self.cu_seqlens[-1]), device=self.cu_seqlens.device)
        sequence = torch.bucketize(columns, self.cu_seqlens[1:], right=True).view(rows, -1)
        length = sequence.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=sequence.device).tril()
        return (causal & (sequence[:, :, None] == sequence[:, None, :])).unsqueeze(1)


def varlen_metadata(mask: Tensor | None, seq_idx: Tensor | None) -> VarlenMetadata | None:
    """The sequences of rows with padding `mask` (B, T), bool or int, and ids `seq_idx` (B, T).

    At least one of the two must be given. Returns None if the rows are empty, or if a sequence is
    interrupted or the ids of a row do not ascend. Synchronizes with the device once.
    """
    ids = _sequence_ids(mask, seq_idx)
    device, ids = ids.device, ids.cpu()
    rows, length = ids.shape
    if ids.numel() == 0:
        return None
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    real = ids >= 0
    # Offset ids by row, so that each contiguous sequence starts with exactly one increase.
    increases = (ids + torch.arange(rows).unsqueeze(1) * (ids.max() + 1))[real].diff()
    runs = int((begins & real).sum())
    if bool((increases < 0).any()) or runs > int((increases > 0).sum()) + 1:
        return None
    starts = begins.flatten().nonzero().flatten()
    cu_seqlens = torch.cat((starts, torch.tensor([rows * length])))
    max_seqlen = int(cu_seqlens.diff().max())
    return VarlenMetadata(cu_seqlens.int().to(device), max_seqlen, tuple(cu_seqlens.tolist()))


def _sequence_ids(mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """(B, T) int64 from 0, -1 for padding."""
    if seq_idx is None:
        assert mask is not None, "give mask or seq_idx"
        return mask.bool().long() - 1
    ids = seq_idx.long()
    if ids.numel() > 0:
        ids = ids - ids.min()
    return ids if mask is None else ids.masked_fill(~mask.bool(), -1)
