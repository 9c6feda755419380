"""The head of a GGUF file, walked before any library reads it: every count must fit in the file.

Little-endian throughout: magic, version (u32), counts of tensors and of fields (u64); a field is a
name, the kind of its value (u32) and the value. Text is its length (u64) and its bytes, an array
the kind of its items (u32), their count (u64) and the items.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from mmmamba_cli.errors import CheckpointError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bytes of a value by its kind; text and arrays have lengths of their own.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9
# The least a tensor takes in the head: the lengths of its name, dimensions, kind and place.
TENSOR_BYTES = 8 + 4 + 4 + 8
DEEPEST = 4


def is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX


def check_header(path: Path) -> None:
    """Raise `CheckpointError` unless the head is one, and lies wholly within the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with GGUF")
        try:
            _walk(file, size)
        except (_Damage, struct.error) as error:
            raise CheckpointError(
                f"{path} cannot be read as GGUF: {error if str(error) else 'it ends too early'}",
                "download it again, it may be cut off",
            ) from error


class _Damage(Exception):
    """What is wrong with the head."""


def _walk(file: BinaryIO, size: int) -> None:
    version = _number(file, "<I")
    if version not in VERSIONS:
        raise _Damage(f"its version is {version}, known are {', '.join(map(str, VERSIONS))}")
    tensors, fields = _number(file, "<Q"), _number(file, "<Q")
    _fits(file, size, tensors * TENSOR_BYTES, "tensors")
    for _ in range(fields):
        _skip_text(file, size)
        _skip_value(file, size, _number(file, "<I"), 0)


def _skip_value(file: BinaryIO, size: int, kind: int, depth: int) -> None:
    if kind == TEXT:
        _skip_text(file, size)
    elif kind == ARRAY and depth < DEEPEST:
        inner, count = _number(file, "<I"), _number(file, "<Q")
        if inner in SIZES:
            _skip(file, size, count * SIZES[inner])
            return
        # Text and arrays have at least a length each.
        _fits(file, size, count * 8, "items of an array")
        for _ in range(count):
            _skip_value(file, size, inner, depth + 1)
    elif kind in SIZES:
        _skip(file, size, SIZES[kind])
    else:
        raise _Damage(f"a field has a value of unknown kind {kind}")


def _number(file: BinaryIO, form: str) -> int:
    raw = file.read(struct.calcsize(form))
    (value,) = struct.unpack(form, raw)
    return int(value)


def _skip_text(file: BinaryIO, size: int) -> None:
    _skip(file, size, _number(file, "<Q"))


def _skip(file: BinaryIO, size: int, count: int) -> None:
    _fits(file, size, count, "bytes of a field")
    file.seek(count, 1)


def _fits(file: BinaryIO, size: int, count: int, what: str) -> None:
    if count > size - file.tell():
        raise _Damage(f"it announces more {what} than it holds")
