"""Named tensors of a checkpoint in one or more files, read lazily."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol

from mmmamba_cli.checkpoint.name_map import MERGE_HINT, unwrapped_names
from mmmamba_cli.checkpoint.safetensors_file import (
    DOWNLOAD_AGAIN,
    MAX_HEADER_BYTES,
    SafetensorsFile,
    parse_json,
)
from mmmamba_cli.checkpoint.tensor_info import TensorInfo, quoted
from mmmamba_cli.errors import CheckpointError, name_some

if TYPE_CHECKING:
    from torch import Tensor

FileFormat = Literal["safetensors", "pickle", "gguf"]

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
INDEX_SUFFIX = ".index.json"
# Stem of peft's adapter weights file.
ADAPTER_STEM = "adapter_model"
# In the order of preference of transformers.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class TensorReader(Protocol):
    """An opened file of tensors."""

    infos: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor: ...

    def close(self) -> None: ...


class TensorSource:
    """A read-only set of named tensors in one or more files.

    `names` is in the order of the files and of the data in them; `files` are the files with
    tensors. Tensors are memory-mapped if the format allows it. They stay valid after `close` and
    must not be written to.
    """

    def __init__(
        self,
        kind: FileFormat,
        readers: Mapping[Path, TensorReader],
        stored: Mapping[str, str] | None = None,
    ):
        """`stored` maps tensor names to the names in the files, if they differ."""
        self.kind: FileFormat = kind
        self.files = tuple(readers)
        self._readers = tuple(readers.values())
        owner = {name: reader for reader in self._readers for name in reader.infos}
        stored = {name: name for name in owner} if stored is None else stored
        self._owner = {name: (owner[inside], inside) for name, inside in stored.items()}
        self.names = tuple(self._owner)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and size of a tensor, without reading it. Raises `KeyError`."""
        reader, inside = self._owner[name]
        return reader.infos[inside]

    def read(self, name: str) -> Tensor:
        """Read a tensor to the CPU in its stored dtype. Raises `KeyError`."""
        reader, inside = self._owner[name]
        return reader.read(inside)

    def drop_suffix(self, suffix: str) -> None:
        """Drop tensors whose names end with `suffix`: buffers that are not part of the model."""
        self._owner = {n: place for n, place in self._owner.items() if not n.endswith(suffix)}
        self.names = tuple(self._owner)

    def content_hash(self, progress: Callable[[int], None] | None = None) -> str:
        """The content hash (see `hashing`); `progress` is called with bytes as they are read."""
        from mmmamba_cli.checkpoint.hashing import TensorHasher

        with TensorHasher() as hasher:
            for name in self.names:
                hasher.submit(name, self.read(name))
                if progress is not None:
                    progress(self.info(name).nbytes)
            return hasher.result()

    def close(self) -> None:
        """Close the files. Tensors cannot be read afterwards."""
        for reader in self._readers:
            reader.close()
        self._readers = ()
        self._owner = {}

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_source(path: str | Path) -> TensorSource:
    """Open a Hugging Face folder, a `.safetensors` file, or a PyTorch state dict.

    Only the tensors' descriptions are read: safetensors without torch, PyTorch state dicts with it.
    Module names of training wrappers are removed (see `unwrapped_names`). Raises `CheckpointError`
    if the path is missing, of an unknown type, incomplete, damaged, ambiguous, an adapter, or if it
    contains code.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = _find_in_folder(path)
        elif not path.exists():
            raise CheckpointError(f"{path} does not exist")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path)
    return _unwrapped_source(_kind_of(path), {path: _open_file(path)}, path)


def _find_in_folder(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return folder / name
    weights = sorted(path.name for path in folder.iterdir() if _has_known_suffix(path))
    if not weights:
        raise CheckpointError(
            f"{folder} holds no checkpoint, looked for {', '.join(WEIGHT_FILES)}",
            "give the folder or the file that holds the weights",
        )
    adapters = [name for name in weights if Path(name).stem == ADAPTER_STEM]
    if adapters == weights:
        raise CheckpointError(f"{folder} holds a peft adapter: {name_some(adapters)}", MERGE_HINT)
    raise CheckpointError(
        f"{folder} holds {name_some(weights)} and no index that says which of them belong together",
        f"give one file, or add its {WEIGHT_FILES[1]}",
    )


def _has_known_suffix(path: Path) -> bool:
    return path.suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)


def _kind_of(path: Path) -> FileFormat:
    if not _has_known_suffix(path):
        raise CheckpointError(
            f"{path} is of unknown kind, expected a folder, {SAFETENSORS_SUFFIX} or "
            f"{', '.join(PICKLE_SUFFIXES)}"
        )
    return "safetensors" if path.suffix == SAFETENSORS_SUFFIX else "pickle"


def _open_file(path: Path) -> TensorReader:
    # Opening a named pipe, for example, would block.
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    if _kind_of(path) == "safetensors":
        return SafetensorsFile(path)
    from mmmamba_cli.checkpoint.torch_pickle import PickleFile

    return PickleFile(path)


def _open_index(path: Path) -> TensorSource:
    weight_map = _read_index(path)
    readers: dict[Path, TensorReader] = {}
    owner: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        reader = _open_file(path.parent / shard)
        readers[path.parent / shard] = reader
        twice = [name for name in reader.infos if name in owner]
        if twice:
            raise CheckpointError(
                f"{path.parent}: {shard} and {owner[twice[0]]} both hold "
                f"{name_some(map(quoted, twice))}"
            )
        owner.update(dict.fromkeys(reader.infos, shard))
    absent = [name for name, shard in weight_map.items() if owner.get(name) != shard]
    if absent:
        raise CheckpointError(
            f"{path} names tensors that are not in their shards: "
            f"{name_some(f'{quoted(name)} in {quoted(weight_map[name])}' for name in absent)}",
            DOWNLOAD_AGAIN,
        )
    unnamed = [name for name in owner if name not in weight_map]
    if unnamed:
        raise CheckpointError(
            f"{path} does not name {len(unnamed)} tensors that its shards hold: "
            f"{name_some(map(quoted, unnamed))}",
            DOWNLOAD_AGAIN,
        )
    kinds = {_kind_of(shard) for shard in readers}
    if len(kinds) > 1:
        raise CheckpointError(f"{path} mixes safetensors and PyTorch files")
    return _unwrapped_source(kinds.pop(), readers, path)


def _read_index(path: Path) -> dict[str, str]:
    """The weight map of an index, tensor name to shard; checks that all shards exist."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_HEADER_BYTES} bytes, not an index")
        index = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map of tensor to file", DOWNLOAD_AGAIN)
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            f"{path} has a weight_map whose files are not all names", DOWNLOAD_AGAIN
        )
    shards = list(dict.fromkeys(weight_map.values()))
    outside = [shard for shard in shards if not _is_inside(shard)]
    if outside:
        raise CheckpointError(
            f"{path} names files outside its folder, which are never read: "
            f"{name_some(map(quoted, outside))}"
        )
    missing = [shard for shard in shards if not _is_file(path.parent / shard)]
    if missing:
        raise CheckpointError(
            f"{path} names shards that are missing: {name_some(map(quoted, missing))}",
            DOWNLOAD_AGAIN,
        )
    return weight_map


def _is_inside(shard: str) -> bool:
    """Whether a shard name stays in the index's folder.

    A symbolic link may still lead outside, as in Hugging Face's cache.
    """
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    return (
        "\0" not in shard
        and not posix.is_absolute()
        and not windows.anchor
        and ".." not in (*posix.parts, *windows.parts)
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # name too long, or not encodable
        return False


def _unwrapped_source(
    kind: FileFormat, readers: Mapping[Path, TensorReader], path: Path
) -> TensorSource:
    if not any(reader.infos for reader in readers.values()):
        raise CheckpointError(f"{path} holds no tensors")
    names = [name for reader in readers.values() for name in reader.infos]
    return TensorSource(kind, readers, unwrapped_names(names, path))
