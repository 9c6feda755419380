"""An opened checkpoint of any known format: its architecture and its tensors by native name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmamba_cli.architecture import Architecture, is_fp32_parameter, parameter_shapes
from mmmamba_cli.checkpoint import hovle, llama_family, mmmamba_hf, native_config
from mmmamba_cli.checkpoint.config_fields import read_json
from mmmamba_cli.checkpoint.gguf_file import is_gguf, open_gguf
from mmmamba_cli.checkpoint.model_names import resolve_path
from mmmamba_cli.checkpoint.name_map import Shape, TensorMapping, check_names, rename
from mmmamba_cli.checkpoint.tensor_info import TensorInfo
from mmmamba_cli.checkpoint.tensor_source import TensorSource, open_source
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.teachers import MODEL_TYPE_PREFIX

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmmamba_cli.checkpoint.hashing import TensorHasher
    from mmmamba_cli.checkpoint.in_place_checkpoint import InPlaceCheckpoint
    from mmmamba_cli.model import HolisticVLMConfig

NATIVE_MODEL_TYPE = native_config.MODEL_TYPE
KNOWN_MODEL_TYPES = (
    hovle.MODEL_TYPE,
    mmmamba_hf.MODEL_TYPE,
    *llama_family.MODEL_TYPES,
    NATIVE_MODEL_TYPE,
)
SOURCE_CONFIG = "source_config.json"
# The tensor whose dtype is taken as the model's: parameters such as A_log are always fp32.
DTYPE_TENSOR = "model.text_embedding.weight"
# Said by commands that know only models of class `HolisticVLM`.
NOT_YET_IN_PLACE = (
    "has mixers in the place of the attention of a transformers model, which this command does not "
    "take yet"
)
NOT_YET_HINT = (
    "seed, distill, hybridize, eval, profile, report, ablate, inspect, status, chat and export do"
)
# In the order of preference of transformers.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
UNUSED_TENSORS = {"unused.class_embedding", "unused.language_token_embedding.weight"}
# Largest number of elements of a tensor: torch counts bytes in int64, at four bytes per element.
MAX_ELEMENTS = (1 << 63) // 4


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its architecture, and its tensors by native name.

    torch and transformers are imported only when `config` or a tensor is read. `raw_config` is the
    config of the teacher: the checkpoint's own, or that of the teacher it was made from.
    `tokenizer_file` is None if none was found, and the checkpoint itself for GGUF. `assumed` names
    config fields that were filled in, not read.
    """

    path: Path
    model_type: str
    architecture: Architecture
    raw_config: Mapping[str, Any]
    source: TensorSource
    name_map: list[TensorMapping]
    tokenizer_file: Path | None = None
    assumed: tuple[str, ...] = ()
    # The file that the config was read from, and, for the native layout, its contents: they have
    # more fields than the architecture.
    config_file: str = "config.json"
    native_config_values: Mapping[str, Any] | None = None
    _mapping_of: dict[str, tuple[TensorMapping, int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for mapping in self.name_map:
            for position, name in enumerate(mapping.native):
                self._mapping_of[name] = (mapping, position)

    @property
    def folder(self) -> Path:
        """The folder of the weights, the config and the tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def config(self) -> HolisticVLMConfig:
        """transformers' config. Raises `CheckpointError` for fields that transformers refuses."""
        from mmmamba_cli.checkpoint.native_config import native_model_config, to_model_config

        if self.native_config_values is None:
            return to_model_config(self.architecture)
        return native_model_config(self.native_config_values, self.config_file)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by native name."""
        return {name: shape for mapping in self.name_map for name, shape in mapping.native.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._mapping_of

    def info(self, name: str) -> TensorInfo:
        """Native shape, and the dtype of the first foreign tensor it is converted from."""
        mapping, _ = self._mapping_of[name]
        dtype_name = self.source.info(next(iter(mapping.foreign))).dtype_name
        return TensorInfo(dtype_name, mapping.native[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.info(name).dtype

    def read(self, name: str) -> Tensor:
        """Read a tensor by native name; memory-mapped if the format allows it."""
        mapping, position = self._mapping_of[name]
        return mapping.to_native(*(self.source.read(foreign) for foreign in mapping.foreign))[
            position
        ]

    def foreign_names(self, name: str) -> tuple[str, ...]:
        """Names in the file of the tensors that `name` is converted from."""
        return tuple(self._mapping_of[name][0].foreign)


def open_checkpoint(
    path: str | Path,
    *,
    config_file: Path | None = None,
    tokenizer_file: Path | None = None,
    arch: str | None = None,
) -> Checkpoint:
    """Open a HoVLE, a published mmMamba, a plain language model or a native folder.

    `path` may be the name of a shipped model or a Hub id. A bare state dict takes its config from
    `config_file`, else from `config.json` beside it, else from `arch`; a GGUF file contains its
    config. safetensors are opened without torch; GGUF files and PyTorch state dicts need it.

    Raises `CheckpointError`, also if a tensor is missing, unexpected or misshaped.
    """
    path = resolve_path(path)
    folder = path if path.is_dir() else path.parent
    assumed: tuple[str, ...] = ()
    if is_gguf(path):
        if config_file is not None or arch is not None:
            raise CheckpointError(f"{path} carries its own config", "leave out --config and --arch")
        raw, source = open_gguf(path)
        where = str(path)
    else:
        source = open_source(path)
        raw, where, assumed = _find_config(path, folder, config_file, arch)
    model_type = _model_type(raw, where)
    native_config_values = raw if model_type == NATIVE_MODEL_TYPE else None
    if model_type == NATIVE_MODEL_TYPE:
        architecture, name_map = _native_name_map(raw, source, where)
        native_config.warn_outdated_code(raw, where)
        raw = read_config(folder / SOURCE_CONFIG) if (folder / SOURCE_CONFIG).is_file() else raw
    elif model_type == hovle.MODEL_TYPE:
        architecture = hovle.to_architecture(raw, where)
        name_map = hovle.name_map(raw, architecture, source.names)
    elif model_type == mmmamba_hf.MODEL_TYPE:
        architecture = mmmamba_hf.to_architecture(raw, where)
        name_map = mmmamba_hf.name_map(raw, architecture, source.names)
    else:
        source.drop_suffix(llama_family.DERIVED_SUFFIX)
        architecture = llama_family.to_architecture(raw, where)
        name_map = llama_family.name_map(raw, architecture, source.names)
    shapes = {name: source.info(name).shape for name in source.names}
    check_names(name_map, shapes, str(path))
    tokenizer = _find_tokenizer(path, folder, architecture, tokenizer_file)
    return Checkpoint(
        path,
        model_type,
        architecture,
        raw,
        source,
        name_map,
        tokenizer,
        assumed,
        where,
        native_config_values=native_config_values,
    )


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `name` is stored for a model in `dtype`: decay, gates, norms stay fp32."""
    import torch

    return torch.float32 if is_fp32_parameter(name) and dtype != torch.float64 else dtype


def stored_dtype_name(name: str, dtype_name: str) -> str:
    """`stored_dtype` by dtype names."""
    return "float32" if is_fp32_parameter(name) and dtype_name != "float64" else dtype_name


def tensor_plan(shapes: Mapping[str, Shape], dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Descriptions of the tensors `shapes` for a writer, for a model in `dtype`."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        name: TensorInfo(stored_dtype_name(name, dtype_name), shape)
        for name, shape in shapes.items()
    }


def _native_name_map(
    raw: Mapping[str, Any], source: TensorSource, where: str
) -> tuple[Architecture, list[TensorMapping]]:
    config = native_config.to_architecture(raw, where)
    if config.num_hidden_layers > len(source.names):
        raise CheckpointError(
            f"{where} has {config.num_hidden_layers} layers, its weights are "
            f"{len(source.names)} tensors",
            native_config.HINT,
        )
    shapes = parameter_shapes(config)
    if any(prod(shape) > MAX_ELEMENTS for shape in shapes.values()):
        raise CheckpointError(f"{where} has sizes that no tensor can have", native_config.HINT)
    kept = {name: source.info(name).shape for name in source.names if name in UNUSED_TENSORS}
    return config, [rename(name, name, shape) for name, shape in {**shapes, **kept}.items()]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _find_config(
    path: Path, home: Path, config_file: Path | None, arch: str | None
) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:
    if config_file is not None:
        return read_config(config_file), str(config_file), ()
    beside = home / "config.json"
    if beside.is_file():
        return read_config(beside), str(beside), ()
    if arch is None:
        raise CheckpointError(
            f"{path} comes without a config: there is no {beside}",
            "put its config.json beside it; mmmamba seed also takes --config FILE, or its "
            f"architecture with --arch {' | '.join(hovle.ARCHITECTURES)}",
        )
    if arch not in hovle.ARCHITECTURES:
        known = ", ".join(hovle.ARCHITECTURES)
        raise CheckpointError(f"architecture {arch!r} is not known, known are: {known}")
    return hovle.ARCHITECTURES[arch], f"--arch {arch}", hovle.ASSUMED_FIELDS


def _find_tokenizer(
    path: Path, home: Path, config: Architecture, given: Path | None
) -> Path | None:
    if given is not None:
        if not given.is_file():
            raise CheckpointError(f"tokenizer {given} is not there", "check the path")
        return given
    if is_gguf(path):
        return path
    # With vision the tokenizer is HoVLE's SentencePiece model.
    names = TOKENIZER_FILES if config.vision is None else TOKENIZER_FILES[1:]
    return next((home / name for name in names if (home / name).is_file()), None)


def _model_type(raw: Mapping[str, Any], where: str) -> str:
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind.startswith(MODEL_TYPE_PREFIX):
        raise CheckpointError(f"{where} {NOT_YET_IN_PLACE}", NOT_YET_HINT)
    if kind not in KNOWN_MODEL_TYPES:
        raise CheckpointError(
            f"{where}: model_type is {kind!r:.60}, known are {', '.join(KNOWN_MODEL_TYPES)}",
            "give the config.json of such a model, or of a folder mmmamba wrote; mmmamba seed "
            "also takes the folder of another model of transformers",
        )
    return str(kind)


def read_config(file: Path) -> Mapping[str, Any]:
    """The contents of a config.json. Raises `CheckpointError` unless it is a JSON object."""
    try:
        value = read_json(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is not there", "check the path") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object, expected a model config")
    return value


def checked_reader(
    checkpoint: Checkpoint | InPlaceCheckpoint, hasher: TensorHasher
) -> Callable[[str], Tensor]:
    """Wrap `checkpoint.read` to hash every file tensor and to check it for NaN and infinity.

    `hasher` raises `CheckpointError` for such values (see `TensorHasher.submit`). A tensor that is
    not converted is the object that is hashed, so that a writer need not hash it again.
    """
    from mmmamba_cli.checkpoint.tensor_io import is_same_memory

    hashed: set[str] = set()

    def read(name: str) -> Tensor:
        sources = []
        for foreign in checkpoint.foreign_names(name):
            if foreign not in hashed:
                hashed.add(foreign)
                sources.append(hasher.submit(foreign, checkpoint.source.read(foreign), check=True))
        tensor = checkpoint.read(name)
        return next((one for one in sources if is_same_memory(one, tensor)), tensor)

    return read
