"""Where sequences begin and end in rows of columns.

Legend: B batch, T columns of a row, N sequences of all rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Sequences of B rows of T columns, the rows laid end to end; padding is one of them too.

    `bounds` (N + 1,) int32: sequence n is columns bounds[n] to bounds[n + 1]; `longest` of them in
    columns.
    """

    bounds: Tensor
    longest: int

    def mask(self, rows: int) -> Tensor:
        """The same as (B, 1, T, T) bool, True where a query may look."""
        columns = torch.arange(int(self.bounds[-1]), device=self.bounds.device)
        number = torch.bucketize(columns, self.bounds[1:], right=True).view(rows, -1)
        length = number.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=number.device).tril()
        return (causal & (number[:, :, None] == number[:, None, :])).unsqueeze(1)


def segments_of(mask: Tensor | None, seq_idx: Tensor | None) -> Segments | None:
    """Of columns whose `mask` (B, T), bool or int, marks real ones, and whose `seq_idx` (B, T)
    tells packed sequences apart; not both None.

    None where that cannot be said: a sequence with a gap, ids that do not ascend in a row, nothing.
    Waits for the device, once.
    """
    ids = _ids(mask, seq_idx)
    device, ids = ids.device, ids.cpu()
    rows, length = ids.shape
    if ids.numel() == 0:
        return None
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    real = ids >= 0
    # Larger in later rows: a sequence in one piece is a step up where it begins, and only there.
    ordered = (ids + torch.arange(rows).unsqueeze(1) * (ids.max() + 1))[real].diff()
    pieces = int((begins & real).sum())
    if bool((ordered < 0).any()) or pieces > int((ordered > 0).sum()) + 1:
        return None
    bounds = torch.cat((begins.flatten().nonzero().flatten(), torch.tensor([rows * length])))
    longest = int(bounds.diff().max())
    return Segments(bounds.int().to(device), longest)


def _ids(mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """(B, T) int64 from 0, -1 for padding."""
    if seq_idx is None:
        assert mask is not None, "all columns are one sequence a row"
        return mask.bool().long() - 1
    ids = seq_idx.long()
    if ids.numel() > 0:
        ids = ids - ids.min()
    return ids if mask is None else ids.masked_fill(~mask.bool(), -1)
