"""Summary and memory of a transformers model: a teacher, or a student with mixers in its place.

Sizes come from transformers' config, and no weight is read. Sizes of keys and values are those of
the text decoder; the vision tower keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from mmmamba_cli.architecture import (
    ATTENTION,
    LINEAR,
    CacheBytes,
    MixerConfig,
    StackConfig,
    mixer_spec,
)
from mmmamba_cli.checkpoint import InPlaceCheckpoint, parse_dtype_name
from mmmamba_cli.checkpoint.tensor_info import ITEMSIZES
from mmmamba_cli.errors import DataError
from mmmamba_cli.inspection.memory import MemoryEstimate
from mmmamba_cli.inspection.summary import (
    ATTENTION_PART,
    LANGUAGE,
    LINEAR_PART,
    PART_ORDER,
    CheckpointSummary,
    MixerSummary,
    PartSummary,
    StackSummary,
    count_dtypes,
    options_read,
)
from mmmamba_cli.recipe import plan_kind

TOWER_PART = "vision tower and projector"
NO_FAST_DECODING = "models of transformers have no fast decoding yet"


def describe_in_place(checkpoint: InPlaceCheckpoint) -> CheckpointSummary:
    """Summarize a transformers model by its config and headers; no tensor is read.

    Raises:
        CheckpointError: missing, unexpected or misshaped tensors.
        MmmambaError: a teacher that cannot be converted.
    """
    from mmmamba_cli.checkpoint.prompt_files import missing_prompt_files
    from mmmamba_cli.teachers import text_config

    text, source, mixers = text_config(checkpoint.config), checkpoint.source, _mixers(checkpoint)
    parts = _parts(checkpoint)
    options = MixerConfig() if checkpoint.plan is None else checkpoint.plan.options
    missing = missing_prompt_files(checkpoint)
    return CheckpointSummary(
        path=str(checkpoint.path),
        layout=f"transformers ({checkpoint.model_type})",
        container=source.kind,
        files=len(source.files),
        file_bytes=sum(Path(file).stat().st_size for file in source.files),
        kind=plan_kind(len(checkpoint.attention_layers), checkpoint.num_layers),
        layer_types=tuple(mixer_spec(name).layer_type for name in mixers),
        mixers=tuple(
            MixerSummary(
                name,
                mixer_spec(name).title,
                tuple(layer for layer, other in enumerate(mixers) if other == name),
                mixer_spec(name).is_default,
                is_packed=False,
            )
            for name in dict.fromkeys(mixers)
        ),
        slow_decoding=NO_FAST_DECODING,
        stacks=(_stack_summary(checkpoint),),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        parameters=sum(part.parameters for part in parts),
        parts=parts,
        dtypes=count_dtypes(source),
        tokenizer=None if missing else ("processor" if checkpoint.has_vision else "tokenizer"),
        vision=_vision(checkpoint),
        mixer=options_read(mixers, options),
        assumed=(),
    )


def memory_of_in_place(
    name: str, checkpoint: InPlaceCheckpoint, context: int, dtype: str | None = None
) -> list[MemoryEstimate]:
    """Estimate the memory of a model and, unless it is all attention, of its teacher.

    `dtype` None is the one in which the weights are stored.

    Raises:
        CheckpointError: if `dtype` is not known.
        DataError: if `context` is below 1.
    """
    if context < 1:
        raise DataError(f"--context is {context}, expected at least 1 token")
    itemsize = (
        ITEMSIZES[parse_dtype_name(dtype)] if dtype is not None else checkpoint.dtype.itemsize
    )
    mixers = _mixers(checkpoint)
    teacher = tuple("attention" for _ in mixers)
    added = _added(checkpoint)
    estimates = [_estimate(name, checkpoint, mixers, context, itemsize, dtype, frozenset())]
    if estimates[0].linear_layers:
        estimates.append(
            _estimate("all attention", checkpoint, teacher, context, itemsize, dtype, added)
        )
    return estimates


def _estimate(
    name: str,
    checkpoint: InPlaceCheckpoint,
    mixers: Sequence[str],
    context: int,
    itemsize: int,
    dtype: str | None,
    left_out: frozenset[str],
) -> MemoryEstimate:
    options = MixerConfig() if checkpoint.plan is None else checkpoint.plan.options
    layers = tuple(
        mixer_spec(mixer).cache_bytes(stack, options, 1, min(context, columns), itemsize)
        if mixer_spec(mixer).layer_type == ATTENTION
        else mixer_spec(mixer).cache_bytes(stack, options, 1, context, itemsize)
        for mixer, (stack, columns) in zip(mixers, _stacks(checkpoint, context), strict=True)
    )
    cache = sum(layers, CacheBytes())
    kinds = [mixer_spec(mixer).layer_type for mixer in mixers]
    return MemoryEstimate(
        name,
        sum(
            _loaded_bytes(checkpoint, one, itemsize, dtype)
            for one in checkpoint.source.names
            if one not in left_out
        ),
        cache.kv_cache,
        cache.conv_state,
        cache.ssm_state,
        kinds.count(ATTENTION),
        kinds.count(LINEAR),
        layers,
    )


def _loaded_bytes(
    checkpoint: InPlaceCheckpoint, name: str, itemsize: int, dtype: str | None
) -> int:
    """Bytes of a tensor in memory; mixers' small parameters keep fp32."""
    info = checkpoint.info(name)
    small = frozenset() if checkpoint.plan is None else checkpoint.plan.fp32_parameters
    is_small = not small.isdisjoint(checkpoint.layout.names[name].split("."))
    if dtype is None or is_small or not info.dtype.is_floating_point:
        return info.nbytes
    return prod(info.shape) * itemsize


def _mixers(checkpoint: InPlaceCheckpoint) -> tuple[str, ...]:
    if checkpoint.plan is not None:
        return checkpoint.plan.mixers
    return ("attention",) * checkpoint.num_layers


def _added(checkpoint: InPlaceCheckpoint) -> frozenset[str]:
    """Names of tensors that the teacher lacks."""
    if checkpoint.plan is None:
        return frozenset()
    from mmmamba_cli.runs.in_place_product import new_tensors

    return frozenset(new_tensors(checkpoint.config))


def _stacks(checkpoint: InPlaceCheckpoint, context: int) -> list[tuple[StackConfig, int]]:
    """The sizes of each layer, and the columns that attention there keeps of `context`."""
    from mmmamba_cli.teachers.layer_sizes import text_layer_sizes

    found = text_layer_sizes(checkpoint.config)
    return [(stack, context if window is None else window) for stack, window in found]


def _stack_summary(checkpoint: InPlaceCheckpoint) -> StackSummary:
    """The text decoder; the sizes of its first layer."""
    (stack, _), *_ = _stacks(checkpoint, 1)
    return StackSummary(
        LANGUAGE,
        0,
        checkpoint.num_layers,
        checkpoint.attention_layers,
        stack.num_heads,
        stack.num_kv_heads,
        stack.head_dim,
        stack.intermediate_size,
    )


def _vision(checkpoint: InPlaceCheckpoint) -> dict[str, Any] | None:
    if not checkpoint.has_vision:
        return None
    return {"model_type": checkpoint.config.vision_config.model_type}


def _parts(checkpoint: InPlaceCheckpoint) -> tuple[PartSummary, ...]:
    """Parameters by part, with the bytes as stored."""
    from mmmamba_cli.teachers import anatomy_of

    layers_path = anatomy_of(checkpoint.config).layers_path
    names: dict[str, list[str]] = {}
    layers: dict[str, set[int]] = {}
    for name, own in checkpoint.layout.names.items():
        part, layer = _part_of(own, layers_path, checkpoint.attention_layers)
        names.setdefault(part, []).append(name)
        if layer is not None:
            layers.setdefault(part, set()).add(layer)
    return tuple(
        PartSummary(
            part,
            len(names[part]),
            sum(prod(checkpoint.info(name).shape) for name in names[part]),
            sum(checkpoint.info(name).nbytes for name in names[part]),
            len(layers.get(part, ())),
        )
        for part in (TOWER_PART, *PART_ORDER)
        if part in names
    )


def _part_of(
    name: str, layers_path: str, attention_layers: Sequence[int]
) -> tuple[str, int | None]:
    """The part of a tensor by its name in the model, and its layer of the text decoder."""
    decoder = layers_path.rpartition(".")[0]
    if name.startswith(f"{layers_path}."):
        layer, _, rest = name.removeprefix(f"{layers_path}.").partition(".")
        index = int(layer)
        if rest.startswith("self_attn."):
            return (ATTENTION_PART if index in attention_layers else LINEAR_PART), index
        return ("norms" if "norm" in rest.split(".")[0] else "MLPs"), index
    if name.startswith("lm_head."):
        return "output head", None
    if name.startswith(f"{decoder}.embed_tokens"):
        return "token embedding", None
    return ("final norm" if name.startswith(f"{decoder}.norm.") else TOWER_PART), None
