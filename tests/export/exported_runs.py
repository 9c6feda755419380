"""A run whose products are exported, and the command line in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mmmamba_cli.cli.app import app

CASE = Path(__file__).parents[1] / "golden/hovle_pre"


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
