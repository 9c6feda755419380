"""Layers chosen by measurement: what the teacher's attention is worth in each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.layer_selection.budget import (
    BytesBudget,
    CountBudget,
    kv_bytes_per_layer,
    parse_bytes,
    parse_count,
)
from mmmamba_cli.layer_selection.layer_scores import (
    LayerScore,
    LayerScores,
    read_layer_scores,
    spearman,
)
from mmmamba_cli.layer_selection.options import SelectionCallbacks, SelectionOptions
from mmmamba_cli.lazy_imports import lazy_attributes

if TYPE_CHECKING:
    from mmmamba_cli.layer_selection.selection import (
        MeasuredLayers,
        select_layers,
        select_planned_layers,
    )

__all__ = [
    "BytesBudget",
    "CountBudget",
    "LayerScore",
    "LayerScores",
    "MeasuredLayers",
    "SelectionCallbacks",
    "SelectionOptions",
    "kv_bytes_per_layer",
    "parse_bytes",
    "parse_count",
    "read_layer_scores",
    "select_layers",
    "select_planned_layers",
    "spearman",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "selection": ("MeasuredLayers", "select_layers", "select_planned_layers"),
    },
)
