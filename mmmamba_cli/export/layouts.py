"""Export layouts: name map and config per format, and checks that nothing is lost.

An option that a format cannot represent raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmmamba_cli.checkpoint import DTYPE_TENSOR, Checkpoint, hovle, mmmamba_hf, stored_dtype
from mmmamba_cli.checkpoint.name_map import TensorMapping, rename
from mmmamba_cli.errors import CheckpointError, name_some
from mmmamba_cli.export.foreign_config import hovle_config, mmmamba_hf_config
from mmmamba_cli.model import LINEAR, HolisticVLMConfig
from mmmamba_cli.model.config import INHERITED_FIELDS

LANGUAGE_TOKENS = "unused.language_token_embedding.weight"
HUB, MMMAMBA_HF, HOVLE = "hub", "mmmamba-hf", "hovle"
FORMATS = (HUB, MMMAMBA_HF, HOVLE)
# RoPE scaling types that the published code supports; the model supports more.
PUBLISHED_ROPE_SCALINGS = ("dynamic", "linear")


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is written: a name map, and a `config.json` (None: the native one).

    `dtype` returns the dtype in which a native tensor is written.
    """

    name: str
    name_map: list[TensorMapping]
    config: dict[str, Any] | None
    dtype: Callable[[str], torch.dtype]


def make_layout(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> Layout:
    """The layout of `checkpoint` in format `name`; `dtype` None keeps every tensor's dtype.

    Raises `CheckpointError` for an unknown format, or with the features that it cannot represent.
    """
    if name not in FORMATS:
        raise CheckpointError(f"format {name!r} is not known, known are: {', '.join(FORMATS)}")
    body = dtype or checkpoint.dtype(DTYPE_TENSOR)
    if name == HUB:
        name_map = [rename(key, key, shape) for key, shape in checkpoint.shapes.items()]
        return Layout(name, name_map, None, lambda key: stored_dtype(key, body))
    problems = list(_unsupported_features(checkpoint.config, name))
    if problems:
        raise CheckpointError(
            f"format {name} cannot hold {checkpoint.path}: it has no {'; no '.join(problems)}",
            f"--format {HUB} holds everything",
        )
    raw = (hovle_config if name == HOVLE else mmmamba_hf_config)(checkpoint, body)
    _check_config(checkpoint, raw, name)
    table = (hovle if name == HOVLE else mmmamba_hf).name_map(
        raw, checkpoint.config, _written_names(checkpoint, raw)
    )
    _check_complete(checkpoint, table, name)
    return Layout(name, table, raw, lambda key: dtype or checkpoint.dtype(key))


def _unsupported_features(config: HolisticVLMConfig, name: str) -> Iterator[str]:
    """Features of the model that HoVLE's or mmMamba's layout cannot represent."""
    if config.vision is None or config.embedding is None:
        yield "place for a language model without vision"
        return
    mixer = config.mixer_config
    linear = [i for i, kind in enumerate(config.layer_types) if kind == LINEAR]
    if name == HOVLE and linear:
        yield f"linear layers, and layer {linear[0]} is one"
    elif linear:
        if mixer.conv_width != mmmamba_hf.CONV_WIDTH:
            yield f"convolution of width {mixer.conv_width} (mixer.conv_width), only of 2"
        for option, what in (
            ("d_skip", "D skip"),
            ("qk_norm", "norm on q and k"),
            ("rope", "RoPE inside the mixer"),
        ):
            if getattr(mixer, option):
                yield f"{what} (mixer.{option})"
    for where, stack in (("embedding", config.embedding), ("language", config.language)):
        if stack.qkv_bias or stack.output_bias:
            yield f"biases in attention ({where} stack)"
        if stack.qk_norm:
            yield f"norm on q and k ({where} stack)"
        if stack.num_heads * stack.head_dim != config.hidden_size:
            yield f"head size other than hidden size / heads ({where} stack)"
        scaling = (stack.rope_scaling or {}).get("type")
        if scaling not in (None, *PUBLISHED_ROPE_SCALINGS):
            yield f"RoPE scaling {scaling!r} ({where} stack)"


def _check_config(checkpoint: Checkpoint, raw: Mapping[str, Any], name: str) -> None:
    """Raise `CheckpointError` unless the exported config reads back as the model's."""
    read = (hovle if name == HOVLE else mmmamba_hf).to_config(raw, "the exported config.json")
    differing = [
        field
        for field in (*INHERITED_FIELDS, "layer_types")
        if getattr(checkpoint.config, field) != getattr(read, field)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: its config.json and its source_config.json disagree on "
            f"{name_some(differing)}",
            "take both from the same product",
        )


def _written_names(checkpoint: Checkpoint, raw: Mapping[str, Any]) -> Collection[str] | None:
    """`names` argument of `name_map`: None stores the head, () leaves out an equal tied head."""
    if not hovle.is_tied(raw) or LANGUAGE_TOKENS not in checkpoint:
        return None
    same = torch.equal(checkpoint.read(LANGUAGE_TOKENS), checkpoint.read("lm_head.weight"))
    return () if same else None


def _check_complete(checkpoint: Checkpoint, name_map: list[TensorMapping], name: str) -> None:
    missing = [key for mapping in name_map for key in mapping.native if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks what format {name} keeps though no forward uses it: "
            f"{name_some(missing)}",
            f"export the run's product instead, or use --format {HUB}",
        )
