"""Looking: what a checkpoint is, what it takes in memory, how two differ, what a run has made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.deferred import deferred_names
from mmmamba_cli.inspection.anatomy import Anatomy, describe
from mmmamba_cli.inspection.drawing import layer_plan, legend, marks_for, size, sparkline
from mmmamba_cli.inspection.lineage import Lineage, Product, Score, read_lineage
from mmmamba_cli.inspection.memory import DEFAULT_CONTEXT, Memory, all_attention, memory_at

if TYPE_CHECKING:
    from mmmamba_cli.inspection.difference import TensorDifference, compare, grouped, spans

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

__getattr__ = deferred_names(
    __name__,
    {
        "difference": (
            "TensorDifference",
            "compare",
            "grouped",
            "spans",
        ),
    },
)
