"""Descriptions of checkpoints and runs: layers, memory, differences, lineage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.inspection.lineage import (
    Lineage,
    ProductSummary,
    SuiteScore,
    card_scores,
    read_lineage,
)
from mmmamba_cli.inspection.memory import (
    DEFAULT_CONTEXT,
    MemoryEstimate,
    all_attention,
    memory_at,
    memory_of_checkpoint,
)
from mmmamba_cli.inspection.summary import CheckpointSummary, MixerSummary, describe
from mmmamba_cli.inspection.text_plots import (
    format_bytes,
    format_ranges,
    layer_plan,
    legend,
    marks_for,
    sparkline,
)
from mmmamba_cli.lazy_imports import lazy_attributes

if TYPE_CHECKING:
    from mmmamba_cli.inspection.diff import TensorDifference, compare, group_by_layer

__all__ = [
    "DEFAULT_CONTEXT",
    "CheckpointSummary",
    "Lineage",
    "MemoryEstimate",
    "MixerSummary",
    "ProductSummary",
    "SuiteScore",
    "TensorDifference",
    "all_attention",
    "card_scores",
    "compare",
    "describe",
    "format_bytes",
    "format_ranges",
    "group_by_layer",
    "layer_plan",
    "legend",
    "marks_for",
    "memory_at",
    "memory_of_checkpoint",
    "read_lineage",
    "sparkline",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "diff": (
            "TensorDifference",
            "compare",
            "group_by_layer",
        ),
    },
)
