"""Descriptions of stored tensors (dtype, shape, bytes) without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmmamba_cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# Bytes per element by torch's name of the dtype.
ITEMSIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
# Accepted names of floating dtypes besides torch's.
DTYPE_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "float": "float32",
    "double": "float64",
}
OPTION_DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a stored tensor; `dtype_name` is torch's name of the dtype."""

    dtype_name: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorInfo:
        """The description of a tensor with this torch dtype and shape."""
        return cls(str(dtype).removeprefix("torch."), shape)

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return torch_dtype(self.dtype_name)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZES[self.dtype_name]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def format_size(nbytes: int) -> str:
    """Format a number of bytes in B, kB, MB or GB, as disks count them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"


def torch_dtype(dtype_name: str) -> torch.dtype:
    """The torch dtype of that name."""
    import torch

    found: torch.dtype = getattr(torch, dtype_name)
    return found


def parse_dtype_name(name: str) -> str:
    """torch's name of a floating dtype given by name or alias. Raises `CheckpointError`."""
    dtype_name = DTYPE_ALIASES.get(name, name)
    if dtype_name not in ITEMSIZES or not dtype_name.lstrip("b").startswith("float"):
        raise CheckpointError(f"dtype {name!r} is not known, known are: {', '.join(OPTION_DTYPES)}")
    return dtype_name


def quoted(name: object, limit: int = 120) -> str:
    """A name from an untrusted file, escaped and shortened for a message."""
    text = repr(name)
    return text if len(text) <= limit else f"{text[:limit]}..."
