"""What every part of reading and writing shares: a tensor's description, its bytes, its finiteness.

Hosts are little-endian, as every platform PyTorch is released for, so raw bytes are file bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.errors import CheckpointError

# Large enough that a call costs nothing beside its work, small enough to stay in cache.
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def quoted(name: object, limit: int = 120) -> str:
    """A name out of a foreign file as one printable word for a message."""
    text = repr(name)
    return text if len(text) <= limit else f"{text[:limit]}..."


def slices(tensor: Tensor, limit: int = CHUNK_BYTES) -> Iterator[Tensor]:
    """Views of `tensor`, each of about `limit` bytes or less, together all of it in row order."""
    if tensor.is_contiguous():
        yield from tensor.reshape(-1).split(max(1, limit // tensor.dtype.itemsize))
        return
    rows = limit // tensor[0].nbytes
    if rows:
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from slices(row, limit)


def byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's elements as bytes in row order, without copying what is contiguous."""
    for piece in slices(tensor.detach()):
        yield piece.contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `CheckpointError` naming the tensor if it holds NaN or infinite values, and how many.

    Any shape; dtypes without such values pass. Needs memory for one chunk only.
    """
    if not tensor.dtype.is_floating_point:
        return
    nans = infinities = 0
    for piece in slices(tensor.detach()):
        values = piece.float() if piece.dtype.itemsize == 1 else piece
        wide = torch.promote_types(values.dtype, torch.float32)
        # A sum is finite only if every term is. One that is not may also have overflowed.
        if not math.isfinite(values.sum(dtype=wide)):
            nans += int(values.isnan().sum())
            infinities += int(values.isinf().sum())
    if nans or infinities:
        raise CheckpointError(
            f"tensor {quoted(name)} holds {nans} NaN and {infinities} infinite values of "
            f"{tensor.numel()}, expected finite weights",
            "take a checkpoint from before training diverged, or download this one again",
        )
