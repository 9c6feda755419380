"""Tensor bytes, casts and finiteness checks in chunks, for readers and writers.

All platforms that PyTorch supports are little-endian, so bytes in memory equal bytes in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mmmamba_cli.checkpoint.tensor_info import quoted
from mmmamba_cli.errors import CheckpointError

# Large enough to hide call overhead, small enough for the cache of one core.
CHUNK_BYTES = 1 << 20
# PyTorch parallelizes operations from 32768 elements on. Beside the threads of `BoundedPool` its
# synchronization would cost many times the work.
MAX_SERIAL_ELEMENTS = 30_000
# Without its sign bit, a value is infinite or NaN if its bits are at least these (IEEE 754; fp8:
# arXiv 2209.05433, where E4M3 has no infinity).
NON_FINITE_BITS = {
    torch.float64: 0x7FF0_0000_0000_0000,
    torch.float32: 0x7F80_0000,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float8_e5m2: 0x7C,
    torch.float8_e4m3fn: 0x7F,
}


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


def byte_chunks(tensor: Tensor, limit: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row order; contiguous tensors are not copied.

    Chunks have at most about `limit` bytes.
    """
    for piece in row_slices(tensor.detach(), limit):
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


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same values in the same place."""
    return (one.data_ptr(), one.dtype, one.shape, one.stride()) == (
        other.data_ptr(),
        other.dtype,
        other.shape,
        other.stride(),
    )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `CheckpointError` with their number if the tensor has NaN or infinite values.

    Any shape and dtype. Needs memory for one chunk only.
    """
    if not _is_finite(tensor):
        raise non_finite_error(tensor, name)


def is_finite_chunk(chunk: memoryview, dtype: torch.dtype) -> bool:
    """Whether the values of a chunk of `byte_chunks` of a tensor in `dtype` are finite."""
    first = NON_FINITE_BITS.get(dtype)
    if first is None:
        return True
    bits = dtype.itemsize * 8
    signed = np.frombuffer(chunk, f"i{dtype.itemsize}")
    # Negative values are the largest unsigned numbers. Maxima of integers need no temporary
    # tensor, release the GIL, and use no threads of PyTorch.
    largest, negative = signed.max(initial=0), signed.view(f"u{dtype.itemsize}").max(initial=0)
    return bool(int(largest) < first and int(negative) < first + (1 << (bits - 1)))


def non_finite_error(tensor: Tensor, name: str) -> CheckpointError:
    """The error of a tensor that has NaN or infinite values, which are counted."""
    nans = infinities = 0
    for piece in row_slices(tensor.detach(), MAX_SERIAL_ELEMENTS * tensor.dtype.itemsize):
        values = piece.float() if piece.dtype.itemsize == 1 else piece
        nans += int(values.isnan().sum())
        infinities += int(values.isinf().sum())
    return CheckpointError(
        f"tensor {quoted(name)} holds {nans} NaN and {infinities} infinite values of "
        f"{tensor.numel()}, expected finite weights",
        "take a checkpoint from before training diverged, or download this one again",
    )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor on any device are finite."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    if tensor.device.type == "cpu":
        return all(is_finite_chunk(chunk, tensor.dtype) for chunk in byte_chunks(tensor))
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())
