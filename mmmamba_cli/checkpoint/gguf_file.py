"""GGUF files of llama.cpp: header checks, and config and dequantised tensors by transformers.

transformers silently drops fields and tensors it does not know. The header is therefore checked
first, and a field that would change the computation raises an error that names it.

Header, little-endian: magic, version (u32), number of tensors and of fields (u64), fields. A field
is a name, a value type (u32) and a value. A string is its length (u64) and its bytes; an array is
its item type (u32), its length (u64) and its items.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mmmamba_cli.checkpoint.tensor_info import TensorInfo
from mmmamba_cli.checkpoint.tensor_source import TensorSource
from mmmamba_cli.errors import CheckpointError, name_some

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bytes of a value by its type; strings and arrays have a variable size.
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9
# Minimum size of a tensor's header entry: length of its name, number of dimensions, type, offset.
MIN_TENSOR_ENTRY_BYTES = 8 + 4 + 4 + 8
MAX_ARRAY_DEPTH = 4
REQUIRED_PACKAGES = ("gguf", "accelerate")
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Fields with only one supported value; they may be absent.
SUPPORTED_VALUES = {
    "rope.scaling.type": "none",
    "expert_count": 0,
}
# transformers assumes this head size for Qwen3 and ignores the file's.
QWEN3_HEAD_DIM = 128
# Fields of transformers' config that describe the file, not the model.
FILE_ONLY_FIELDS = ("_name_or_path", "quantization_config", "dtype", "transformers_version")


def is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX


class DequantizedTensors:
    """A `TensorReader` of dequantised tensors: fp32, in memory, under transformers' names."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)
        self.infos = {n: TensorInfo.of(t.dtype, tuple(t.shape)) for n, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def close(self) -> None:
        self._tensors = {}


def open_gguf(path: Path) -> tuple[Mapping[str, Any], TensorSource]:
    """Read transformers' config and all tensors, dequantised.

    Raises `CheckpointError` if required packages are missing, or the file is damaged, has another
    architecture, or has fields or tensors that transformers would drop.
    """
    count = _count_tensors(path)
    import torch
    from transformers import AutoModelForCausalLM

    from mmmamba_cli.processing import isolated
    from mmmamba_cli.processing.quiet_loading import quiet_loading

    with quiet_loading(), isolated(path) as folder:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    raw = json.loads(model.config.to_json_string(use_diff=False))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    lost = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])})
    if lost or count != len(tensors):
        named = f"; missing or misshaped are {name_some(lost)}" if lost else ""
        raise CheckpointError(
            f"{path} holds {count} tensors, a {raw.get('model_type')} with its config has "
            f"{len(tensors)}{named}",
            "check that it was downloaded completely, or give the model's safetensors",
        )
    config = {key: value for key, value in raw.items() if key not in FILE_ONLY_FIELDS}
    return config, TensorSource("gguf", {path: DequantizedTensors(tensors)})


def check_header(path: Path) -> None:
    """Raise `CheckpointError` unless the header is valid and every count fits in the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with GGUF")
        try:
            _check_fields(file, size)
        except (_DamagedHeader, struct.error) as error:
            raise CheckpointError(
                f"{path} cannot be read as GGUF: {error if str(error) else 'it ends too early'}",
                "download it again, it may be cut off",
            ) from error


class _DamagedHeader(Exception):
    """A malformed header; the message says where."""


def _check_fields(file: BinaryIO, size: int) -> None:
    version = _read_number(file, "<I")
    if version not in VERSIONS:
        raise _DamagedHeader(f"its version is {version}, known are {', '.join(map(str, VERSIONS))}")
    tensors, fields = _read_number(file, "<Q"), _read_number(file, "<Q")
    _check_fits(file, size, tensors * MIN_TENSOR_ENTRY_BYTES, "tensors")
    for _ in range(fields):
        _skip_text(file, size)
        _skip_value(file, size, _read_number(file, "<I"), 0)


def _skip_value(file: BinaryIO, size: int, kind: int, depth: int) -> None:
    if kind == TEXT:
        _skip_text(file, size)
    elif kind == ARRAY and depth < MAX_ARRAY_DEPTH:
        inner, count = _read_number(file, "<I"), _read_number(file, "<Q")
        if inner in VALUE_BYTES:
            _skip(file, size, count * VALUE_BYTES[inner])
            return
        # Strings and arrays have a length of 8 bytes each.
        _check_fits(file, size, count * 8, "items of an array")
        for _ in range(count):
            _skip_value(file, size, inner, depth + 1)
    elif kind in VALUE_BYTES:
        _skip(file, size, VALUE_BYTES[kind])
    else:
        raise _DamagedHeader(f"a field has a value of unknown kind {kind}")


def _read_number(file: BinaryIO, form: str) -> int:
    raw = file.read(struct.calcsize(form))
    (value,) = struct.unpack(form, raw)
    return int(value)


def _skip_text(file: BinaryIO, size: int) -> None:
    _skip(file, size, _read_number(file, "<Q"))


def _skip(file: BinaryIO, size: int, count: int) -> None:
    _check_fits(file, size, count, "bytes of a field")
    file.seek(count, 1)


def _check_fits(file: BinaryIO, size: int, count: int, what: str) -> None:
    if count > size - file.tell():
        raise _DamagedHeader(f"it announces more {what} than it holds")


def _count_tensors(path: Path) -> int:
    """Check that transformers reads the whole file, and return its number of tensors."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a regular file", "check the path")
    check_header(path)
    absent = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if absent:
        raise CheckpointError(
            f"{path} is a GGUF file, which takes the packages {' and '.join(absent)} to read",
            "pip install 'mmmamba[gguf]'",
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: reader.fields[name].contents() for name in _model_fields(reader.fields)}
        names = [tensor.name for tensor in reader.tensors]
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(
            f"{path} cannot be read as GGUF: {error}", "download it again, it may be cut off"
        ) from error
    _check_supported(path, fields, names)
    return len(names)


def _default_head_dim(fields: Mapping[str, Any], kind: str) -> int | None:
    """Head size if no field gives it: hidden size over heads."""
    width, heads = (
        fields.get(f"{kind}.embedding_length"),
        fields.get(f"{kind}.attention.head_count"),
    )
    return width // heads if width and heads else None


def _model_fields(fields: Mapping[str, Any]) -> list[str]:
    """Names of the fields that describe the model, without the vocabulary."""
    return [name for name in fields if not name.startswith(("tokenizer.", "GGUF."))]


def _check_supported(path: Path, fields: Mapping[str, Any], names: list[str]) -> None:
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: general.architecture is {kind!r:.60}, known are {', '.join(ARCHITECTURES)}"
        )
    for key, value in SUPPORTED_VALUES.items():
        found = fields.get(f"{kind}.{key}", value)
        if found != value:
            raise CheckpointError(
                f"{path}: {kind}.{key} is {found!r}, only {value!r} is supported in a GGUF file",
                "give the model's safetensors with its config.json",
            )
    if "rope_freqs.weight" in names:
        raise CheckpointError(
            f"{path} scales its positions by rope_freqs.weight, which transformers does not read",
            "give the model's safetensors with its config.json",
        )
    head = QWEN3_HEAD_DIM if kind == "qwen3" else _default_head_dim(fields, kind)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        found = fields.get(f"{kind}.{key}", head)
        if found != head:
            raise CheckpointError(
                f"{path}: {kind}.{key} is {found}, transformers reads GGUF files with heads of "
                f"{head} only",
                "give the model's safetensors with its config.json",
            )
    windows = [name for name in fields if name.startswith(f"{kind}.attention.sliding_window")]
    if windows:
        raise CheckpointError(
            f"{path}: {windows[0]} is {fields[windows[0]]}, only attention without a window is "
            "supported"
        )
