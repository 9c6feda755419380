"""Leaving for other tools: published layouts, and folders that load without this package."""

from mmmamba_cli.export.exporter import ExportResult, export_checkpoint, planned_tensors
from mmmamba_cli.export.hub_upload import check_repository_id, push_to_hub
from mmmamba_cli.export.layouts import FORMATS, HOVLE, HUB, MMMAMBA_HF, make_layout
from mmmamba_cli.export.model_card import CardInfo, CardScore

__all__ = [
    "FORMATS",
    "HOVLE",
    "HUB",
    "MMMAMBA_HF",
    "CardInfo",
    "CardScore",
    "ExportResult",
    "check_repository_id",
    "export_checkpoint",
    "make_layout",
    "planned_tensors",
    "push_to_hub",
]
