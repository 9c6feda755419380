"""A reader of torch.distributed.checkpoint states that runs no code from them.

The index, `.metadata`, is a pickle, which torch unpickles without restriction. Here it is unpickled
into inert records, and torch's own objects are built from their checked contents.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mmmamba_cli.checkpoint.torch_pickle import UNPICKLING_ERRORS
from mmmamba_cli.errors import RunError, name_some

INDEX = ".metadata"
# Exceptions that the unpickler and the checks below raise for a damaged or foreign index.
DAMAGE_ERRORS = (*UNPICKLING_ERRORS, OSError)
HINT = "remove its folder; the stage then goes on from an older state or begins at step 1"

_MODULE = "torch.distributed.checkpoint"
_RECORDS = re.compile(
    rf"{re.escape(_MODULE)}\.metadata\.(Metadata|StorageMeta|MetadataIndex|TensorProperties"
    r"|TensorStorageMetadata|ChunkStorageMetadata|_MEM_FORMAT_ENCODING)"
    rf"|{re.escape(_MODULE)}\.filesystem\._StorageInfo"
    r"|torch\.Size|torch\.serialization\._get_layout"
    # Python before 3.11.4 pickles a member of an enum as getattr(class, name).
    r"|builtins\.getattr"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
)
_SHARD = re.compile(r"__\d+_\d+\.distcp")
_MAX_INDEX_BYTES = 1 << 30


class _InertObject:
    """Stands for any object of the index: stores its arguments and state, and runs nothing."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Replaces every object that an index may hold by an `_InertObject`; rejects other globals."""

    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self._path = path
        # New classes for each file: a pickle can set attributes of a class.
        self._classes: dict[str, type[_InertObject]] = {}

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if _RECORDS.fullmatch(wanted):
            return self._classes.setdefault(wanted, type(name, (_InertObject,), {}))
        dtype = getattr(torch, name, None) if module == "torch" and "." not in name else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise RunError(
            f"{self._path} holds code, which is never run here: it asks for {wanted!r:.200}",
            "remove its folder; it was not written by mmmamba",
        )


class StateReader(FileSystemReader):
    """torch's reader of the shards in `folder`, with a checked index.

    `expected` maps the names of all tensors to be read to their shapes.

    Raises:
        RunError: the index asks for code, lacks a tensor or leads out of the folder, or a shard is
            compressed.
    """

    def __init__(self, folder: Path, expected: Mapping[str, tuple[int, ...]]):
        super().__init__(folder)
        path = folder / INDEX
        try:
            if path.stat().st_size > _MAX_INDEX_BYTES:
                raise ValueError("too large")
            with path.open("rb") as file:
                self._metadata = _metadata(_Unpickler(file, path).load())
            _check_shards(folder, self._metadata.storage_data)
        except DAMAGE_ERRORS as error:
            raise damaged_state(folder) from error
        _check_names(folder, self._metadata, expected)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. The arguments are those of torch's method, and are ignored."""
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


def _check_names(folder: Path, metadata: Metadata, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = metadata.state_dict_metadata
    missing = [name for name in expected if name not in found]
    if missing:
        raise RunError(f"the training state {folder} lacks {name_some(missing, 3)}", HINT)
    for name, shape in expected.items():
        tensor = found[name]
        assert isinstance(tensor, TensorStorageMetadata)
        if tuple(tensor.size) != shape:
            raise RunError(
                f"the training state {folder} has {name} of shape {tuple(tensor.size)}, "
                f"expected {shape}",
                HINT,
            )


def _check_shards(folder: Path, storage: Mapping[MetadataIndex, _StorageInfo]) -> None:
    """Raise one of `DAMAGE_ERRORS` unless each entry is an uncompressed archive inside its file.

    A compressed entry can be a thousand times larger in memory than in the file.
    """
    sizes: dict[str, int] = {}
    for entry in storage.values():
        file = folder / entry.relative_path
        if file.name not in sizes:
            if file.is_symlink() or not file.is_file():
                raise ValueError("no plain file")
            sizes[file.name] = file.stat().st_size
        if entry.offset + entry.length > sizes[file.name]:
            raise ValueError("beyond the end of its file")
        with file.open("rb") as stream, zipfile.ZipFile(_Slice(stream, entry)) as archive:
            for inner in archive.infolist():
                if inner.compress_type != zipfile.ZIP_STORED or inner.file_size > entry.length:
                    raise ValueError("packed")


class _Slice(io.RawIOBase):
    """File object over the bytes of one entry of a shard."""

    def __init__(self, stream: BinaryIO, entry: _StorageInfo):
        self._stream, self._start, self._length = stream, entry.offset, entry.length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence, self._length)
        if self._at < 0:
            raise OSError("before the start")
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._start + self._at)
        part = self._stream.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def damaged_state(folder: Path) -> RunError:
    """The error of a training state in `folder` that cannot be read."""
    return RunError(f"the training state {folder} is damaged: it cannot be read", HINT)


def _metadata(loaded: Any) -> Metadata:
    """Build torch's index from its records. Raises one of `DAMAGE_ERRORS` if it is malformed."""
    fields = _fields(loaded, "Metadata")
    tensors: dict[str, STORAGE_TYPES] = {
        _text(name): _tensor(value) for name, value in _items(fields["state_dict_metadata"])
    }
    storage = {_index(key): _entry(value) for key, value in _items(fields["storage_data"])}
    planner = {name: _place(place) for name, place in _items(fields["planner_data"])}
    return Metadata(tensors, planner, storage, version="1.0.0")


def _fields(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, _InertObject) or type(value).__name__ != name:
        raise ValueError(f"no {name}")
    if not isinstance(value.state, dict):
        raise ValueError(f"{name} without fields")
    return value.state


def _items(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("no mapping")
    return value.items()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError("no size")
    return value


def _size(value: Any) -> torch.Size:
    if not isinstance(value, _InertObject) or type(value).__name__ != "Size":
        raise ValueError("no shape")
    (numbers,) = value.arguments
    if not isinstance(numbers, tuple):
        raise ValueError("no shape")
    return torch.Size([_number(number) for number in numbers])


def _tensor(value: Any) -> TensorStorageMetadata:
    """Metadata of a tensor that its chunks cover; entries of any other kind are rejected."""
    fields = _fields(value, "TensorStorageMetadata")
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("no dtype")
    size = _size(fields["size"])
    if not isinstance(fields["chunks"], list):
        raise ValueError("no chunks")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    parts = [ChunkStorageMetadata(_size(c["offsets"]), _size(c["sizes"])) for c in chunks]
    for part in parts:
        inside = zip(part.offsets, part.sizes, size, strict=True)
        if any(offset + length > whole for offset, length, whole in inside):
            raise ValueError("a chunk beyond its tensor")
    if sum(prod(part.sizes) for part in parts) != prod(size):
        raise ValueError("chunks that do not cover their tensor")
    return TensorStorageMetadata(TensorProperties(dtype), size, parts)


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    number = fields.get("index")
    offset = _size(fields["offset"])
    return MetadataIndex(_text(fields["fqn"]), offset, None if number is None else _number(number))


def _entry(value: Any) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    if not _SHARD.fullmatch(_text(fields["relative_path"])) or fields.get("transform_descriptors"):
        raise ValueError("no shard of this folder")
    return _StorageInfo(
        fields["relative_path"], _number(fields["offset"]), _number(fields["length"])
    )


def _place(value: Any) -> tuple[str, ...]:
    if not isinstance(value, tuple):
        raise ValueError("no place")
    return tuple(_text(part) for part in value)
