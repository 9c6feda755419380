"""Checkpoints in and out, tensor by tensor, under one set of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.checkpoint.atomic_writes import (
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
)
from mmmamba_cli.checkpoint.checkpoint import (
    DTYPE_TENSOR,
    NATIVE_MODEL_TYPE,
    SOURCE_CONFIG,
    Checkpoint,
    checked_reader,
    open_checkpoint,
    stored_dtype,
    stored_dtype_name,
    tensor_plan,
)
from mmmamba_cli.checkpoint.in_place_checkpoint import (
    AnyCheckpoint,
    InPlaceCheckpoint,
    open_any_checkpoint,
    open_in_place,
)
from mmmamba_cli.checkpoint.model_names import (
    hub_name,
    is_hub_id,
    public_model_name,
    resolve_path,
    shipped_models,
)
from mmmamba_cli.checkpoint.tensor_info import TensorInfo, parse_dtype_name
from mmmamba_cli.checkpoint.tensor_source import open_source
from mmmamba_cli.lazy_imports import lazy_attributes

if TYPE_CHECKING:
    from mmmamba_cli.checkpoint.hashing import TensorHasher, combined_hash
    from mmmamba_cli.checkpoint.in_place_loader import (
        load_in_place_model,
        load_in_place_processor,
    )
    from mmmamba_cli.checkpoint.model_loader import (
        default_generation_config,
        generation_config,
        load_model,
        parse_dtype,
        pick_dtype,
    )
    from mmmamba_cli.checkpoint.tensor_io import check_finite
    from mmmamba_cli.checkpoint.writer import ShardedWriter

__all__ = [
    "DTYPE_TENSOR",
    "NATIVE_MODEL_TYPE",
    "SOURCE_CONFIG",
    "AnyCheckpoint",
    "Checkpoint",
    "InPlaceCheckpoint",
    "ShardedWriter",
    "TensorHasher",
    "TensorInfo",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_text",
    "check_finite",
    "checked_reader",
    "combined_hash",
    "default_generation_config",
    "generation_config",
    "hub_name",
    "is_hub_id",
    "load_in_place_model",
    "load_in_place_processor",
    "load_model",
    "open_any_checkpoint",
    "open_checkpoint",
    "open_in_place",
    "open_source",
    "parse_dtype",
    "parse_dtype_name",
    "pick_dtype",
    "public_model_name",
    "resolve_path",
    "shipped_models",
    "stored_dtype",
    "stored_dtype_name",
    "tensor_plan",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "hashing": (
            "TensorHasher",
            "combined_hash",
        ),
        "in_place_loader": (
            "load_in_place_model",
            "load_in_place_processor",
        ),
        "model_loader": (
            "default_generation_config",
            "generation_config",
            "load_model",
            "parse_dtype",
            "pick_dtype",
        ),
        "tensor_io": ("check_finite",),
        "writer": ("ShardedWriter",),
    },
)
