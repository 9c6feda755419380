"""The layout mmMamba was published in (`model_type: mmMamba_chat`): names against ours, both ways.

It is HoVLE's but for the mixers: `layers_block_type` says which layers are Mamba-2, and these have
their five input projections in one tensor. The training code's names, before that fusion, are read
too. Legend: H query heads, K key/value heads, P head dim, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmmamba_cli.architecture import ATTENTION, LINEAR, Architecture, ModelShape, StackConfig
from mmmamba_cli.checkpoint import hovle
from mmmamba_cli.checkpoint.name_map import Rule, Tensors, rename
from mmmamba_cli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from mmmamba_cli.model import HolisticVLMConfig

MODEL_TYPE = "mmMamba_chat"
# The repository whose code reads this layout; transformers takes it from there.
CODE = "hustvl/mmMamba-linear"
EMBEDDING_TYPE = "mmMamba_embedding"
LANGUAGE_TYPE = "mmMamba"
KINDS = {"mha": ATTENTION, "mamba2": LINEAR}
NAMES = {ours: theirs for theirs, ours in KINDS.items()}
# The one width there is: the published convolution has two taps.
CONV_WIDTH = 2


def to_config(raw: Mapping[str, Any], where: str = "config.json") -> HolisticVLMConfig:
    """The config of a published mmMamba as the model's. Raises `CheckpointError`."""
    from mmmamba_cli.checkpoint.native_config import to_model_config

    return to_model_config(to_architecture(raw, where))


def to_architecture(raw: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Translate the config of a published mmMamba. Raises `CheckpointError` naming the field."""
    found = hovle.to_architecture(raw, where, embedding_type=EMBEDDING_TYPE)
    kind = raw["llm_config"].get("model_type", LANGUAGE_TYPE)
    if kind != LANGUAGE_TYPE:
        raise CheckpointError(
            f"{where}: llm_config.model_type is {kind!r}, known is {LANGUAGE_TYPE!r}"
        )
    first = found.num_embedding_layers
    kinds = [
        *_kinds(raw, "embedding_config", first, where),
        *_kinds(raw, "llm_config", found.num_hidden_layers - first, where),
    ]
    return replace(found, layer_types=kinds)


def rules(
    raw: Mapping[str, Any], config: ModelShape, names: Collection[str] | None = None
) -> list[Rule]:
    """The name table of a model with this config.

    `names`, of the tensors at hand, tells for each layer whether its projections are fused, and
    whether a tied head was written out as well; without them they are fused.
    """

    def block(foreign: str, ours: str, config: ModelShape, layer: int) -> list[Rule]:
        if config.layer_types[layer] == ATTENTION:
            return hovle.internlm2_block(foreign, ours, config, layer)
        stack, hidden = config.stack_of(layer), config.hidden_size
        theirs, mixer = f"{foreign}.attention", f"{ours}.mixer"
        fused = names is None or f"{theirs}.q_proj.weight" not in names
        return [
            *(_fused if fused else _apart)(theirs, mixer, stack, hidden),
            *_small(theirs, mixer, stack, hidden),
            *hovle.block_frame(foreign, ours, hidden, stack.intermediate_size),
        ]

    return hovle.rules(raw, config, names, block=block)


def _kinds(raw: Mapping[str, Any], section: str, count: int, where: str) -> list[str]:
    """`layers_block_type` of one stack, in our words."""
    listed = raw[section].get("layers_block_type")
    if not isinstance(listed, list) or len(listed) != count:
        raise CheckpointError(
            f"{where}: {section}.layers_block_type is {listed!r:.60}, expected a list with one of "
            f"{', '.join(map(repr, KINDS))} for each of the {count} layers"
        )
    for index, kind in enumerate(listed):
        if not isinstance(kind, str) or kind not in KINDS:
            raise CheckpointError(
                f"{where}: {section}.layers_block_type[{index}] is {kind!r:.60}, known are "
                f"{', '.join(map(repr, KINDS))}"
            )
    return [KINDS[kind] for kind in listed]


def _rows(stack: StackConfig) -> dict[str, int]:
    """Our projections in the order of the fused rows: v, k, q, gate, dt."""
    wide, narrow = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    return {"v": narrow, "k": narrow, "q": wide, "g": wide, "dt": stack.num_heads}


def _fused(foreign: str, ours: str, stack: StackConfig, hidden: int) -> list[Rule]:
    """One tensor (2 K P + 2 H P + H, D) against five, and the published name of the gated norm."""
    rows = _rows(stack)
    shapes = {f"{ours}.{name}_proj.weight": (size, hidden) for name, size in rows.items()}

    def split(wvkqgdt: Tensor) -> Tensors:
        return tuple(wvkqgdt.split(list(rows.values())))

    def fuse(*projections: Tensor) -> Tensors:
        import torch

        return (torch.cat(projections),)

    norm = f"{foreign}.g_norm_swish_gate.weight"
    return [
        Rule({f"{foreign}.wvkqgdt.weight": (sum(rows.values()), hidden)}, shapes, split, fuse),
        rename(norm, f"{ours}.g_norm.weight", (stack.head_dim,)),
    ]


def _apart(foreign: str, ours: str, stack: StackConfig, hidden: int) -> list[Rule]:
    """The training code's names."""
    theirs = {"dt": "in_proj"}
    return [
        *(
            rename(
                f"{foreign}.{theirs.get(name, f'{name}_proj')}.weight",
                f"{ours}.{name}_proj.weight",
                (size, hidden),
            )
            for name, size in _rows(stack).items()
        ),
        rename(f"{foreign}.g_norm.weight", f"{ours}.g_norm.weight", (stack.head_dim,)),
    ]


def _small(foreign: str, ours: str, stack: StackConfig, hidden: int) -> list[Rule]:
    """What has the same name before and after the fusion; channels are v, k, q, as ours are."""
    rows = _rows(stack)
    channels = rows["v"] + rows["k"] + rows["q"]
    heads = (stack.num_heads,)
    return [
        rename(f"{foreign}.conv1d.weight", f"{ours}.conv1d.weight", (channels, 1, CONV_WIDTH)),
        rename(f"{foreign}.conv1d.bias", f"{ours}.conv1d.bias", (channels,)),
        rename(f"{foreign}.dt_bias", f"{ours}.dt_bias", heads),
        rename(f"{foreign}.A_log_bias", f"{ours}.A_log", heads),
        rename(f"{foreign}.o_proj.weight", f"{ours}.o_proj.weight", (hidden, rows["q"])),
    ]
