"""The model's config, as transformers takes it, from a checkpoint's plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from mmmamba_cli.architecture import Architecture
from mmmamba_cli.checkpoint.own import REMEDY
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.model import HolisticVLMConfig

# What an export adds: where its code is, and how far the model was distilled.
EXPORTED_FIELDS = ("auto_map", "mmmamba")
# What transformers raises for fields of its own, a dtype say, that make no sense.
_MISFITS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def to_model_config(architecture: Architecture) -> HolisticVLMConfig:
    """The config of a model of that architecture."""
    return HolisticVLMConfig(**architecture.values, architectures=["HolisticVLM"])


def own_model_config(raw: Mapping[str, Any], where: str) -> HolisticVLMConfig:
    """The config of a folder that mmmamba wrote, `raw` having passed `own.to_architecture`.

    Raises `CheckpointError` for fields that transformers refuses.
    """
    try:
        # Code that lies in an exported folder is ours; what is made of it here goes without.
        known = {k: v for k, v in raw.items() if k not in EXPORTED_FIELDS}
        return HolisticVLMConfig.from_dict(known)
    except _MISFITS as error:
        raise CheckpointError(
            f"{where} has fields that transformers cannot read as a model's config", REMEDY
        ) from error
