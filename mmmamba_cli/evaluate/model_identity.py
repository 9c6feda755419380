"""The identity of a loaded model in results and in the key of its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from mmmamba_cli.evaluate.interfaces import ModelIdentity
from mmmamba_cli.runs import TEACHER, ResolvedModel

DIGEST_DIGITS = 8
# Fields of a config that depend on who wrote it.
NOT_DIGESTED = ("transformers_version", "dtype", "architectures", "_name_or_path")


def identify(
    found: ResolvedModel,
    *,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    uses_max_tiles: bool = True,
) -> ModelIdentity:
    """The identity of a model; its tensors are hashed if their hash is not known."""
    is_product = found.origin == "product"
    return ModelIdentity(
        name=found.name,
        content_hash=found.content_hash or found.opened.source.content_hash(),
        # A checkpoint outside the run is identified by its tensors alone.
        kind=found.kind if is_product else TEACHER if found.origin == TEACHER else "",
        final=found.final if is_product else None,
        answers_depend_on={
            "config": _digest(config),
            "processor": _digest(processor),
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
        },
        uses_max_tiles=uses_max_tiles,
    )


def _digest(settings: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in settings.items() if key not in NOT_DIGESTED}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]
