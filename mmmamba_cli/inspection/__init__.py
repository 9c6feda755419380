"""Looking: what a checkpoint is, what it takes in memory, how two differ, what a run has made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.inspection.lineage import Lineage, Product, Score, read_lineage
from mmmamba_cli.inspection.memory import DEFAULT_CONTEXT, Memory, all_attention, memory_at
from mmmamba_cli.inspection.summary import Anatomy, describe
from mmmamba_cli.inspection.text_plots import layer_plan, legend, marks_for, size, sparkline
from mmmamba_cli.lazy_imports import lazy_attributes

if TYPE_CHECKING:
    from mmmamba_cli.inspection.diff import TensorDifference, compare, grouped, spans

__all__ = [
    "DEFAULT_CONTEXT",
    "Anatomy",
    "Lineage",
    "Memory",
    "Product",
    "Score",
    "TensorDifference",
    "all_attention",
    "compare",
    "describe",
    "grouped",
    "layer_plan",
    "legend",
    "marks_for",
    "memory_at",
    "read_lineage",
    "size",
    "spans",
    "sparkline",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "diff": (
            "TensorDifference",
            "compare",
            "grouped",
            "spans",
        ),
    },
)
