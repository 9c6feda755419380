"""The published mmMamba layout (`model_type: mmMamba_chat`): its config and its name map.

The layout is HoVLE's except for the mixers: `layers_block_type` marks the Mamba-2 layers, whose
five input projections are one tensor. The unfused names of the training code are read too.
Legend: H query heads, K key/value heads, P head dim, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmmamba_cli.architecture import ATTENTION, LINEAR, Architecture, ModelShape, StackConfig
from mmmamba_cli.checkpoint import hovle
from mmmamba_cli.checkpoint.name_map import TensorMapping, Tensors, rename
from mmmamba_cli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from mmmamba_cli.model import HolisticVLMConfig

MODEL_TYPE = "mmMamba_chat"
# Repository of the code that reads this layout; transformers loads it from there.
CODE_REPOSITORY = "hustvl/mmMamba-linear"
EMBEDDING_TYPE = "mmMamba_embedding"
LANGUAGE_TYPE = "mmMamba"
# The layout's own words. Its linear layers have the default mixer of their layer type.
LAYER_TYPES = {"mha": ATTENTION, "mamba2": LINEAR}
BLOCK_TYPES = {native: theirs for theirs, native in LAYER_TYPES.items()}
# The only supported width: the published convolution has two taps.
CONV_WIDTH = 2


def to_config(raw: Mapping[str, Any], where: str = "config.json") -> HolisticVLMConfig:
    """Convert the config of a published mmMamba to the model's. Raises `CheckpointError`."""
    from mmmamba_cli.checkpoint.native_config import to_model_config

    return to_model_config(to_architecture(raw, where))


def to_architecture(raw: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Convert the config of a published mmMamba. Raises `CheckpointError` that names the field."""
    found = hovle.to_architecture(raw, where, embedding_type=EMBEDDING_TYPE)
    kind = raw["llm_config"].get("model_type", LANGUAGE_TYPE)
    if kind != LANGUAGE_TYPE:
        raise CheckpointError(
            f"{where}: llm_config.model_type is {kind!r}, known is {LANGUAGE_TYPE!r}"
        )
    first = found.num_embedding_layers
    kinds = [
        *_layer_types(raw, "embedding_config", first, where),
        *_layer_types(raw, "llm_config", found.num_hidden_layers - first, where),
    ]
    return replace(found, layer_types=kinds)


def name_map(
    raw: Mapping[str, Any], config: ModelShape, names: Collection[str] | None = None
) -> list[TensorMapping]:
    """The name map of a model with this config.

    `names` of the tensors in the file show for each layer whether its projections are fused, and
    whether a tied head is stored as well. Without `names` the projections are fused.
    """

    def block(foreign: str, native: str, config: ModelShape, layer: int) -> list[TensorMapping]:
        if config.layer_types[layer] == ATTENTION:
            return hovle.internlm2_block(foreign, native, config, layer)
        stack, hidden = config.stack_of(layer), config.hidden_size
        theirs, mixer = f"{foreign}.attention", f"{native}.mixer"
        fused = names is None or f"{theirs}.q_proj.weight" not in names
        return [
            *(_fused_projections if fused else _separate_projections)(theirs, mixer, stack, hidden),
            *_other_tensors(theirs, mixer, stack, hidden),
            *hovle.mlp_and_norms(foreign, native, hidden, stack.intermediate_size),
        ]

    return hovle.name_map(raw, config, names, block=block)


def _layer_types(raw: Mapping[str, Any], section: str, count: int, where: str) -> list[str]:
    """Native layer types of one stack, from its `layers_block_type`."""
    listed = raw[section].get("layers_block_type")
    if not isinstance(listed, list) or len(listed) != count:
        raise CheckpointError(
            f"{where}: {section}.layers_block_type is {listed!r:.60}, expected a list with one of "
            f"{', '.join(map(repr, LAYER_TYPES))} for each of the {count} layers"
        )
    for index, kind in enumerate(listed):
        if not isinstance(kind, str) or kind not in LAYER_TYPES:
            raise CheckpointError(
                f"{where}: {section}.layers_block_type[{index}] is {kind!r:.60}, known are "
                f"{', '.join(map(repr, LAYER_TYPES))}"
            )
    return [LAYER_TYPES[kind] for kind in listed]


def _projection_rows(stack: StackConfig) -> dict[str, int]:
    """Rows of each native projection in the order of the fused tensor: v, k, q, gate, dt."""
    wide, narrow = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    return {"v": narrow, "k": narrow, "q": wide, "g": wide, "dt": stack.num_heads}


def _fused_projections(
    foreign: str, native: str, stack: StackConfig, hidden: int
) -> list[TensorMapping]:
    """Map the fused tensor (2 K P + 2 H P + H, D) to five, and the published gated norm."""
    rows = _projection_rows(stack)
    shapes = {f"{native}.{name}_proj.weight": (size, hidden) for name, size in rows.items()}

    def split(wvkqgdt: Tensor) -> Tensors:
        return tuple(wvkqgdt.split(list(rows.values())))

    def fuse(*projections: Tensor) -> Tensors:
        import torch

        return (torch.cat(projections),)

    norm = f"{foreign}.g_norm_swish_gate.weight"
    return [
        TensorMapping(
            {f"{foreign}.wvkqgdt.weight": (sum(rows.values()), hidden)}, shapes, split, fuse
        ),
        rename(norm, f"{native}.g_norm.weight", (stack.head_dim,)),
    ]


def _separate_projections(
    foreign: str, native: str, stack: StackConfig, hidden: int
) -> list[TensorMapping]:
    """Map the separate projections and the gated norm of the training code."""
    theirs = {"dt": "in_proj"}
    return [
        *(
            rename(
                f"{foreign}.{theirs.get(name, f'{name}_proj')}.weight",
                f"{native}.{name}_proj.weight",
                (size, hidden),
            )
            for name, size in _projection_rows(stack).items()
        ),
        rename(f"{foreign}.g_norm.weight", f"{native}.g_norm.weight", (stack.head_dim,)),
    ]


def _other_tensors(
    foreign: str, native: str, stack: StackConfig, hidden: int
) -> list[TensorMapping]:
    """Map tensors that both variants name alike; conv channels are v, k, q in both layouts."""
    rows = _projection_rows(stack)
    channels = rows["v"] + rows["k"] + rows["q"]
    heads = (stack.num_heads,)
    return [
        rename(f"{foreign}.conv1d.weight", f"{native}.conv1d.weight", (channels, 1, CONV_WIDTH)),
        rename(f"{foreign}.conv1d.bias", f"{native}.conv1d.bias", (channels,)),
        rename(f"{foreign}.dt_bias", f"{native}.dt_bias", heads),
        rename(f"{foreign}.A_log_bias", f"{native}.A_log", heads),
        rename(f"{foreign}.o_proj.weight", f"{native}.o_proj.weight", (hidden, rows["q"])),
    ]
