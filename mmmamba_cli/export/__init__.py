"""Leaving for other tools: published layouts, and folders that load without this package."""

from mmmamba_cli.export.card import Score, Story
from mmmamba_cli.export.exporting import Exported, export_checkpoint, plan_of
from mmmamba_cli.export.layouts import FORMATS, HOVLE, HUB, RELEASED, layout_of
from mmmamba_cli.export.pushing import check_repository, push

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
