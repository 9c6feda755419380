"""Summary of a checkpoint from its headers: layout, layers, parameters, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mmmamba_cli.architecture import (
    ATTENTION,
    LINEAR,
    Architecture,
    MixerConfig,
    mixer_spec,
    slow_decoding_reason,
)
from mmmamba_cli.checkpoint import NATIVE_MODEL_TYPE, Checkpoint, hovle, llama_family, mmmamba_hf
from mmmamba_cli.checkpoint.tensor_source import TensorSource
from mmmamba_cli.recipe import plan_kind

EMBEDDING, LANGUAGE = "embedding", "language"
UNUSED = "kept for exports, used by no forward"
# Parts of a model by the names of their tensors; the first match counts.
PART_RULES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    (UNUSED, lambda name: name.startswith("unused.")),
    ("patch embedding", lambda name: name.startswith("model.vision.")),
    ("token embedding", lambda name: name.startswith("model.text_embedding.")),
    ("MLPs", lambda name: ".mlp." in name),
    ("norms", lambda name: "_norm." in name and ".mixer." not in name),
    ("final norm", lambda name: name.startswith("model.norm.")),
    ("output head", lambda name: name.startswith("lm_head.")),
)
ATTENTION_PART, LINEAR_PART = "attention mixers", "linear mixers"
# In the order of the forward pass.
PART_ORDER = (
    "patch embedding",
    "token embedding",
    ATTENTION_PART,
    LINEAR_PART,
    "MLPs",
    "norms",
    "final norm",
    "output head",
    UNUSED,
)


@dataclass(frozen=True)
class PartSummary:
    """Tensors of one kind. `layers` is the number of layers that have some, 0 outside of layers."""

    name: str
    tensors: int
    parameters: int
    nbytes: int
    layers: int = 0


@dataclass(frozen=True)
class StackSummary:
    """One stack of blocks. Layers are numbered through both stacks."""

    name: str
    first_layer: int
    num_layers: int
    attention_layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


@dataclass(frozen=True)
class MixerSummary:
    """A mixer of a model and the layers that have it.

    `is_default`: it is the mixer of its layer type where a config names none. `is_packed`: the
    generator decodes it; otherwise `generate` decodes the model token by token.
    """

    name: str
    title: str
    layers: tuple[int, ...]
    is_default: bool
    is_packed: bool


@dataclass(frozen=True)
class CheckpointSummary:
    """Summary of a checkpoint.

    `dtypes` maps a dtype to the number of tensors and bytes; `mixer` holds the options that a mixer
    of the model reads; `slow_decoding` is why the generator does not decode the model, or None.
    """

    path: str
    layout: str
    container: str
    files: int
    file_bytes: int
    kind: str
    layer_types: tuple[str, ...]
    mixers: tuple[MixerSummary, ...]
    slow_decoding: str | None
    stacks: tuple[StackSummary, ...]
    hidden_size: int
    vocab_size: int
    parameters: int
    parts: tuple[PartSummary, ...]
    dtypes: Mapping[str, tuple[int, int]]
    tokenizer: str | None
    vision: Mapping[str, object] | None
    mixer: Mapping[str, object]
    assumed: tuple[str, ...]


def describe(checkpoint: Checkpoint) -> CheckpointSummary:
    """Summarize a checkpoint from its headers; no tensor is read."""
    config = checkpoint.architecture
    parts = parts_of(checkpoint)
    source = checkpoint.source
    tokenizer = checkpoint.tokenizer_file
    return CheckpointSummary(
        path=str(checkpoint.path),
        layout=layout_name(checkpoint.model_type),
        container=source.kind,
        files=len(source.files),
        file_bytes=sum(Path(file).stat().st_size for file in source.files),
        kind=plan_kind(len(config.attention_layers), config.num_hidden_layers),
        layer_types=tuple(config.layer_types),
        mixers=mixers_of(config),
        slow_decoding=slow_decoding_reason(config),
        stacks=stacks_of(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        parameters=sum(part.parameters for part in parts if part.name != UNUSED),
        parts=parts,
        dtypes=count_dtypes(source),
        tokenizer=None if tokenizer is None else tokenizer.name,
        vision=None if config.vision is None else dict(config.vision),
        mixer=options_read(config.mixer_names, config.mixer_config),
        assumed=checkpoint.assumed,
    )


def layout_name(model_type: str) -> str:
    """The display name of a layout."""
    if model_type in llama_family.MODEL_TYPES:
        return f"language model ({model_type})"
    names = {
        NATIVE_MODEL_TYPE: "mmmamba",
        hovle.MODEL_TYPE: "HoVLE",
        mmmamba_hf.MODEL_TYPE: "mmMamba as published",
    }
    return names[model_type]


def mixers_of(config: Architecture) -> tuple[MixerSummary, ...]:
    """The mixers of a model, in the order of their first layers."""
    names = config.mixer_names
    return tuple(
        MixerSummary(
            name,
            mixer_spec(name).title,
            tuple(layer for layer, other in enumerate(names) if other == name),
            mixer_spec(name).is_default,
            mixer_spec(name).is_packed(config.mixer_config),
        )
        for name in dict.fromkeys(names)
    )


def options_read(mixers: Sequence[str], options: MixerConfig) -> dict[str, object]:
    """The options that the linear ones of `mixers` read."""
    specs = {mixer_spec(name) for name in mixers}
    read = {option for spec in specs if spec.layer_type == LINEAR for option in spec.options}
    return {name: value for name, value in vars(options).items() if name in read}


def count_dtypes(source: TensorSource) -> dict[str, tuple[int, int]]:
    """Number of tensors and bytes of each dtype, most bytes first."""
    dtypes: dict[str, tuple[int, int]] = {}
    for name in source.names:
        info = source.info(name)
        tensors, nbytes = dtypes.get(info.dtype_name, (0, 0))
        dtypes[info.dtype_name] = (tensors + 1, nbytes + info.nbytes)
    return dict(sorted(dtypes.items(), key=lambda item: -item[1][1]))


def stacks_of(config: Architecture) -> tuple[StackSummary, ...]:
    """The stacks of a model: one for a plain language model, otherwise two."""
    found, first = [], 0
    named = ((EMBEDDING, config.embedding), (LANGUAGE, config.language))
    for name, stack in named:
        if stack is None:
            continue
        layers = range(first, first + stack.num_layers)
        found.append(
            StackSummary(
                name,
                first,
                stack.num_layers,
                tuple(i for i in layers if config.layer_types[i] == ATTENTION),
                stack.num_heads,
                stack.num_kv_heads,
                stack.head_dim,
                stack.intermediate_size,
            )
        )
        first += stack.num_layers
    return tuple(found)


def parts_of(checkpoint: Checkpoint) -> tuple[PartSummary, ...]:
    """Parameters by part, with the bytes as stored."""
    shapes = checkpoint.shapes
    names: dict[str, list[str]] = {}
    for name in shapes:
        names.setdefault(part_of(name, checkpoint.architecture), []).append(name)
    return tuple(
        PartSummary(
            part,
            len(names[part]),
            sum(prod(shapes[name]) for name in names[part]),
            sum(checkpoint.info(name).nbytes for name in names[part]),
            len({layer_of(name) for name in names[part]} - {None}),
        )
        for part in PART_ORDER
        if part in names
    )


def part_of(name: str, config: Architecture) -> str:
    """The part of a tensor, by its name in mmmamba's layout."""
    layer = layer_of(name)
    if layer is not None and ".mixer." in name:
        return ATTENTION_PART if config.layer_types[layer] == ATTENTION else LINEAR_PART
    return next(part for part, belongs in PART_RULES if belongs(name))


def layer_of(name: str) -> int | None:
    """The layer of a tensor, numbered through both stacks; None outside of layers."""
    words = name.split(".")
    return int(words[2]) if words[:2] == ["model", "layers"] else None
