"""Run directories: products, their manifests and lineage, and the lock on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.lazy_imports import lazy_attributes
from mmmamba_cli.runs.manifest import Manifest, Parent, read_manifest
from mmmamba_cli.runs.resolved_model import (
    TEACHER,
    ResolvedModel,
    check_unique_names,
    open_training_processor,
    pick_placement,
    resolve_model,
    resolve_path,
    resolve_product,
    resolve_teacher,
)
from mmmamba_cli.runs.run import Run, RunRecord, Teacher

if TYPE_CHECKING:
    from mmmamba_cli.runs.product import (
        ProductModel,
        ProductSpec,
        holistic_model,
        open_processor,
        write_model_files,
        write_product,
    )

__all__ = [
    "TEACHER",
    "Manifest",
    "Parent",
    "ProductModel",
    "ProductSpec",
    "ResolvedModel",
    "Run",
    "RunRecord",
    "Teacher",
    "check_unique_names",
    "holistic_model",
    "open_processor",
    "open_training_processor",
    "pick_placement",
    "read_manifest",
    "resolve_model",
    "resolve_path",
    "resolve_product",
    "resolve_teacher",
    "write_model_files",
    "write_product",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "product": (
            "ProductModel",
            "ProductSpec",
            "holistic_model",
            "open_processor",
            "write_model_files",
            "write_product",
        ),
    },
)
