"""PyTorch state dicts (`.ckpt`, `.pt`, `.pth`, `.bin`), read without running code in them.

`torch.load(weights_only=True)` reads the file. This module adds checks: no compressed entries (they
cannot be memory-mapped, and may be a zip bomb), no tensor larger than the file, only tensors.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.checkpoint.safetensors_file import DOWNLOAD_AGAIN, DTYPE_NAMES
from mmmamba_cli.checkpoint.tensor_info import TensorInfo, quoted
from mmmamba_cli.errors import CheckpointError, name_some

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")

# Exceptions of the unpickler and the zip reader for damaged input. A pickle is a program, so that a
# damaged one fails in many ways.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)

# Globals of a plain state dict; any other is reported as code.
_PLAIN_GLOBAL = re.compile(
    r"torch\.(\w*Storage|Size|Tensor|device|u?int\d+|float\w+|bfloat16|half|double|bool)"
    r"|torch\.storage\.(Untyped|Typed)Storage|torch\._utils\._rebuild_\w+"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|(builtins|__builtin__)\.(bytearray|set|complex)"
)

_OLD_FORMAT_PICKLES = 4  # magic number, version, system, state dict; storages' raw bytes follow
_SCAN_BYTES = 64 << 20  # far larger than the pickle of a state dict


class PickleFile:
    """The tensors of a state dict, memory-mapped except in PyTorch's legacy format.

    Unwraps `state_dict`, `model_state_dict` and `model`. Raises `CheckpointError`.
    """

    def __init__(self, path: Path):
        try:
            size = path.stat().st_size
            state = _unwrap(_load(path, size), path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        _check_tensors(state, size, path)
        self._tensors = {name: tensor.detach() for name, tensor in state.items()}
        self.infos = {
            name: TensorInfo.of(tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def close(self) -> None:
        """Release the tensors; those already read stay valid."""
        self._tensors.clear()


def _load(path: Path, size: int) -> Any:
    if size == 0:
        raise CheckpointError(f"{path} is empty, expected a PyTorch state dict", DOWNLOAD_AGAIN)
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip:
            _check_zip(path, size)
        with warnings.catch_warnings():
            # After a warning, for example of another pickle protocol, torch reads or refuses.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNPICKLING_ERRORS as error:
        code = _find_code(path)
        if code:
            raise CheckpointError(
                f"{path} holds code, which is never run here: it asks for {name_some(code)}",
                "if you trust it, convert it where its code may run: " + _conversion(path),
            ) from error
        raise CheckpointError(
            f"{path} is damaged, or is no state dict written by torch.save",
            f"{DOWNLOAD_AGAIN}, or write its tensors as safetensors: {_conversion(path)}",
        ) from error


def _conversion(path: Path) -> str:
    """A shell command that converts the file to safetensors and runs the code in it."""
    return (
        'python -c "import torch, safetensors.torch as s; '
        f"d = torch.load({str(path)!r}, weights_only=False, map_location='cpu'); "
        "d = d.state_dict() if hasattr(d, 'state_dict') else d.get('state_dict', d); "
        "s.save_file({k: v.clone().contiguous() for k, v in d.items()}, "
        f'{str(path.with_suffix(".safetensors"))!r})"'
    )


def _check_zip(path: Path, size: int) -> None:
    """Raise `CheckpointError` unless every entry is uncompressed and within the file."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = [
        entry.filename
        for entry in entries
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
    ]
    if packed:
        raise CheckpointError(
            f"{path} holds compressed entries, which torch.save never writes: "
            f"{name_some(map(quoted, packed))}",
            f"save it again with torch.save, or as safetensors: {_conversion(path)}",
        )
    beyond = [entry.filename for entry in entries if entry.header_offset + entry.file_size > size]
    if beyond:
        raise CheckpointError(
            f"{path} has entries that reach beyond its end: {name_some(map(quoted, beyond))}",
            DOWNLOAD_AGAIN,
        )


def _unwrap(loaded: Any, path: Path) -> Mapping[Any, Any]:
    """Find the state dict in a loaded object, which may contain itself."""
    seen: set[int] = set()
    while isinstance(loaded, Mapping) and not any(isinstance(v, Tensor) for v in loaded.values()):
        seen.add(id(loaded))
        nested = [loaded[nest] for nest in STATE_DICT_KEYS if isinstance(loaded.get(nest), Mapping)]
        if not nested or id(nested[0]) in seen:
            break
        loaded = nested[0]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path} holds one object of type {type(loaded).__name__}, expected a state dict "
            f"(names to tensors), or one under {', '.join(STATE_DICT_KEYS)}"
        )
    return loaded


def _check_tensors(state: Mapping[Any, Any], size: int, path: Path) -> None:
    """Raise `CheckpointError` unless all entries are named dense tensors that fit in the file."""
    odd = [name for name in state if not isinstance(name, str)]
    if odd:
        raise CheckpointError(
            f"{path}: expected text as tensor names, found {name_some(map(quoted, odd))}"
        )
    other = [
        f"{quoted(name)} ({type(value).__name__})"
        for name, value in state.items()
        if not isinstance(value, Tensor)
    ]
    if other:
        raise CheckpointError(
            f"{path}: expected a state dict of tensors only, found {name_some(other)}",
            "save only the state dict, at the top level or under one of "
            f"{', '.join(STATE_DICT_KEYS)}",
        )
    for name, tensor in state.items():
        problem = _tensor_problem(name, tensor, size)
        if problem:
            raise CheckpointError(f"{path}: tensor {quoted(name)} {problem}", DOWNLOAD_AGAIN)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in state.values()
    }
    if sum(storages.values()) > size:
        raise CheckpointError(
            f"{path}: its tensors claim more bytes than the file holds", DOWNLOAD_AGAIN
        )


def _tensor_problem(name: str, tensor: Tensor, size: int) -> str | None:
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        return "has a name that is not UTF-8"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return "is sparse, nested or quantized, expected a plain one"
    if tensor.device.type != "cpu":
        return "comes without data"
    dtype_name = str(tensor.dtype).removeprefix("torch.")
    if dtype_name not in DTYPE_NAMES:
        return f"has unknown dtype {dtype_name}, known are {', '.join(DTYPE_NAMES)}"
    if tensor.nbytes > size:
        return f"claims {tensor.nbytes} bytes, the file has {size}"
    return None


def _find_code(path: Path) -> list[str]:
    """Globals in the file's pickles other than a state dict's, found without loading."""
    found: dict[str, None] = {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
                for name in pickles:
                    with archive.open(name) as file:
                        _find_globals(file.read(_SCAN_BYTES), found, pickles=1)
        else:
            with path.open("rb") as file:
                _find_globals(file.read(_SCAN_BYTES), found, pickles=_OLD_FORMAT_PICKLES)
    except UNPICKLING_ERRORS:
        pass  # damaged from here on; the globals found so far are reported
    return list(found)


def _find_globals(data: bytes, found: dict[str, None], pickles: int) -> None:
    """Add the globals of consecutive pickles in `data` to `found`."""
    stream = io.BytesIO(data)
    for _ in range(pickles):
        memo: dict[int, str | None] = {}
        strings = ["", ""]  # the last two on the stack: the operands of STACK_GLOBAL
        top: str | None = None
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = top
            elif opcode.name.endswith("PUT"):
                memo[_index(argument)] = top
            elif opcode.name in ("GLOBAL", "INST"):
                _add_global(str(argument).replace(" ", ".", 1), found)
            elif opcode.name == "STACK_GLOBAL":
                _add_global(".".join(strings), found)
            else:
                got = memo.get(_index(argument)) if opcode.name.endswith("GET") else argument
                top = got if isinstance(got, str) else None
                if top is not None:
                    strings = [strings[1], top]


def _index(argument: object) -> int:
    return argument if isinstance(argument, int) else -1


def _add_global(wanted: str, found: dict[str, None]) -> None:
    if not _PLAIN_GLOBAL.fullmatch(wanted):
        found[quoted(wanted).strip("'")] = None
