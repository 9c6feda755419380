"""Leaving for other tools: published layouts, and folders that load without this package."""

from mmmamba_cli.export.exporter import Exported, export_checkpoint, plan_of
from mmmamba_cli.export.hub_upload import check_repository, push
from mmmamba_cli.export.layouts import FORMATS, HOVLE, HUB, RELEASED, layout_of
from mmmamba_cli.export.model_card import Score, Story

__all__ = [
    "FORMATS",
    "HOVLE",
    "HUB",
    "RELEASED",
    "Exported",
    "Score",
    "Story",
    "check_repository",
    "export_checkpoint",
    "layout_of",
    "plan_of",
    "push",
]
