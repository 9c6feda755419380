"""Ablations: a plan of arms and seeds, a runner of its cells, and tables from their JSON."""

from mmmamba_cli.ablation.cell_record import CellRecord, read_records
from mmmamba_cli.ablation.cells import Cell, expand
from mmmamba_cli.ablation.plan import Plan, load_plan

__all__ = ["Cell", "CellRecord", "Plan", "expand", "load_plan", "read_records"]
