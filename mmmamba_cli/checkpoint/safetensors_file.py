"""The safetensors file format: 8 bytes header length, a JSON header, then the tensors' bytes.

Own reader: a damaged or hostile file raises one clear error and cannot cause a large allocation;
headers are read without torch. Own header writer: a shard is written without keeping it in memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from mmmamba_cli.checkpoint.tensor_info import ITEMSIZES, TensorInfo, quoted
from mmmamba_cli.errors import CheckpointError, name_some

if TYPE_CHECKING:
    from torch import Tensor

# torch's dtype name by the format's.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPE_NAMES = {dtype_name: name for name, dtype_name in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 64  # PyTorch's own limit
DOWNLOAD_AGAIN = "download or copy it again"

# A private mapping: an accidental write neither changes the file nor crashes. Without NORESERVE the
# kernel would require free memory of the size of the file.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_MAP_FLAGS = mmap.MAP_PRIVATE | _NORESERVE


class SafetensorsFile:
    """A memory-mapped `.safetensors` file. Raises `CheckpointError` if it is damaged."""

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                data_start, header = _read_header(file, size, path)
                self.infos, self._offsets = _read_entries(header, size - data_start, path)
                self._map = mmap.mmap(
                    file.fileno(), 0, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        self._data_start = data_start

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file; the tensor keeps the mapping alive."""
        import torch

        info = self.infos[name]
        start = self._data_start + self._offsets[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if start % info.itemsize:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=info.nbytes, offset=start)
            return raw.clone().view(info.dtype).reshape(info.shape)
        count = math.prod(info.shape)
        flat = torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=start)
        return flat.reshape(info.shape)

    def close(self) -> None:
        """Release the mapping; tensors already read keep it alive."""
        del self._map


def build_header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The header bytes of a file with these tensors, and each tensor's offset in the file.

    Wider dtypes come first, so that every tensor is aligned to its element size.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    for name in sorted(infos, key=lambda name: -infos[name].itemsize):
        info, start = infos[name], end
        end = start + info.nbytes
        places[name] = start
        entries[name] = {
            "dtype": DTYPE_NAMES[info.dtype_name],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + start for name, start in places.items()}


def parse_json(text: bytes, where: str) -> Any:
    """Parse UTF-8 JSON; duplicate keys and NaN are errors. Raises `CheckpointError`."""

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise CheckpointError(f"{where} names {name_some(map(quoted, twice))} more than once")
        return result

    def refuse_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(
            text.decode(), object_pairs_hook=refuse_repeats, parse_constant=refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON", DOWNLOAD_AGAIN) from error


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[int, dict[str, Any]]:
    """Return the offset of the data and the header; allocates at most the size of the file."""
    if size == 0:
        raise CheckpointError(f"{path} is empty, expected a safetensors file", DOWNLOAD_AGAIN)
    if size < 8:
        raise CheckpointError(f"{path} ends within its first 8 bytes", DOWNLOAD_AGAIN)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} announces a header of {length} bytes, more than the "
            f"{MAX_HEADER_BYTES} allowed: it is damaged or not a safetensors file",
            DOWNLOAD_AGAIN,
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path} ends within its header: it announces {length} bytes, {size - 8} are there",
            DOWNLOAD_AGAIN,
        )
    header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a table of tensors", DOWNLOAD_AGAIN)
    return 8 + length, header


def _read_entries(
    header: dict[str, Any], data_bytes: int, path: Path
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Validate every entry; return descriptions and offsets in the order of the data."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"the header of {path} has metadata that is not text", DOWNLOAD_AGAIN)
    infos: dict[str, TensorInfo] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        try:
            name.encode()
            infos[name], ranges[name] = _read_entry(entry)
        except ValueError as error:
            problem = error if not isinstance(error, UnicodeError) else "its name is not UTF-8"
            raise CheckpointError(
                f"{path}: tensor {quoted(name)}: {problem}", DOWNLOAD_AGAIN
            ) from error
    ordered = sorted(ranges, key=lambda name: ranges[name])
    end = 0
    for name in ordered:
        start, stop = ranges[name]
        if start != end:
            raise CheckpointError(
                f"{path}: tensor {quoted(name)} starts at byte {start} of the data where the one "
                f"before it ends at {end}: tensors overlap or leave a gap",
                DOWNLOAD_AGAIN,
            )
        end = stop
    if end != data_bytes:
        raise CheckpointError(
            f"{path} holds {data_bytes} bytes of tensors, its header speaks of {end}: "
            f"{'it was cut off' if end > data_bytes else 'something was appended'}",
            DOWNLOAD_AGAIN,
        )
    return {name: infos[name] for name in ordered}, {name: ranges[name][0] for name in ordered}


def _read_entry(entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """A tensor's description and byte range. Raises `ValueError` with the reason."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("expected dtype, shape and data_offsets, and nothing else")
    dtype_name = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype_name is None:
        raise ValueError(f"unknown dtype {quoted(entry['dtype'])}, known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_whole_numbers(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"shape {quoted(shape)} is not at most {MAX_DIMS} whole numbers")
    # In an empty tensor the other sizes may be huge, and PyTorch multiplies all of them.
    if math.prod(max(size, 1) for size in shape) * ITEMSIZES[dtype_name] >= 2**63:
        raise ValueError(f"shape {quoted(shape)} is too large")
    if not _is_whole_numbers(offsets) or len(offsets) != 2 or max(offsets) >= 2**63:
        raise ValueError(f"data_offsets {quoted(offsets)} are not two whole numbers")
    info = TensorInfo(dtype_name, tuple(shape))
    if offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(
            f"data_offsets {quoted(offsets)} span {offsets[1] - offsets[0]} bytes, its shape and "
            f"dtype need {info.nbytes}"
        )
    return info, (offsets[0], offsets[1])


def _is_whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
