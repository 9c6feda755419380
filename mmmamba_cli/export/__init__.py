"""Exports: published layouts, and folders that load without this package."""

from mmmamba_cli.export.exporter import (
    ExportResult,
    export_bytes,
    export_checkpoint,
    missing_files,
    push_to_hub,
)
from mmmamba_cli.export.layouts import FORMATS, HOVLE, HUB, MMMAMBA_HF
from mmmamba_cli.export.model_card import CardInfo, CardScore, unchanged_ancestors

__all__ = [
    "FORMATS",
    "HOVLE",
    "HUB",
    "MMMAMBA_HF",
    "CardInfo",
    "CardScore",
    "ExportResult",
    "export_bytes",
    "export_checkpoint",
    "missing_files",
    "push_to_hub",
    "unchanged_ancestors",
]
