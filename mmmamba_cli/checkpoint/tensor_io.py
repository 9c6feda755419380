"""Tensor bytes, casts and finiteness checks in chunks, for readers and writers.

All platforms that PyTorch supports are little-endian, so bytes in memory equal bytes in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mmmamba_cli.checkpoint.tensor_info import quoted
from mmmamba_cli.errors import CheckpointError

# Large enough to hide call overhead, small enough for the CPU cache.
CHUNK_BYTES = 4 << 20
# PyTorch parallelizes operations from 32768 elements on. Beside the threads of `BoundedPool` its
# synchronization would cost many times the work.
MAX_SERIAL_ELEMENTS = 30_000


def row_slices(tensor: Tensor, limit: int = CHUNK_BYTES) -> Iterator[Tensor]:
    """Yield views of at most about `limit` bytes that cover `tensor` in row order."""
    if tensor.is_contiguous():
        yield from tensor.reshape(-1).split(max(1, limit // tensor.dtype.itemsize))
        return
    rows = limit // tensor[0].nbytes
    if rows:
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from row_slices(row, limit)


def byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row order; contiguous tensors are not copied."""
    for piece in row_slices(tensor.detach()):
        yield piece.contiguous().reshape(-1).view(torch.uint8).numpy().data


def cast_chunks(tensor: Tensor, dtype: torch.dtype, name: str) -> Iterator[memoryview]:
    """Yield the bytes of `tensor.to(dtype)`, converted in chunks.

    Raises `CheckpointError` if a finite value becomes infinite in the new dtype.
    """
    for piece in row_slices(tensor.detach(), MAX_SERIAL_ELEMENTS * tensor.dtype.itemsize):
        converted = piece.to(dtype)
        if not _is_finite(converted) and _is_finite(piece):
            raise _overflow_error(name, dtype)
        yield from byte_chunks(converted)


def cast(
    tensor: Tensor, dtype: torch.dtype, name: str, device: torch.device | str | None = None
) -> Tensor:
    """A copy of `tensor` in `dtype` on `device` (its own if None), any shape.

    Raises `CheckpointError` if a finite value becomes infinite in the new dtype.
    """
    converted = tensor.to(device or tensor.device, dtype, copy=True)
    if dtype != tensor.dtype and not _is_finite(converted) and _is_finite(tensor):
        raise _overflow_error(name, dtype)
    return converted


def _overflow_error(name: str, dtype: torch.dtype) -> CheckpointError:
    return CheckpointError(
        f"tensor {quoted(name)} holds values that do not fit into "
        f"{str(dtype).removeprefix('torch.')}",
        "choose bfloat16 or float32",
    )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `CheckpointError` with their number if the tensor has NaN or infinite values.

    Any shape and dtype. Needs memory for one chunk only.
    """
    nans = infinities = 0
    for piece in row_slices(tensor.detach(), MAX_SERIAL_ELEMENTS * tensor.dtype.itemsize):
        if not _is_finite(piece):
            values = piece.float() if piece.dtype.itemsize == 1 else piece
            nans += int(values.isnan().sum())
            infinities += int(values.isinf().sum())
    if nans or infinities:
        raise CheckpointError(
            f"tensor {quoted(name)} holds {nans} NaN and {infinities} infinite values of "
            f"{tensor.numel()}, expected finite weights",
            "take a checkpoint from before training diverged, or download this one again",
        )


def _is_finite(piece: Tensor) -> bool:
    if not piece.dtype.is_floating_point:
        return True
    values = piece.float() if piece.dtype.itemsize == 1 else piece
    wide = torch.promote_types(values.dtype, torch.float32)
    # A finite sum implies finite terms; an infinite one may be an overflow.
    return math.isfinite(values.sum(dtype=wide)) or bool(values.isfinite().all())
