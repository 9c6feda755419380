"""What the shell may offer for names: read from folders and files, so that no torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

import typer

PRODUCTS, MANIFEST = "products", "manifest.json"
TEACHER = "teacher"


def complete_products(context: typer.Context, incomplete: str) -> list[str]:
    """Products of the run that is named on the line, in MMMAMBA_RUN, or by default."""
    from mmmamba_cli.cli.options import DEFAULT_RUN

    run = context.params.get("run") or os.environ.get("MMMAMBA_RUN") or DEFAULT_RUN
    try:
        folders = sorted(Path(run, PRODUCTS).iterdir())
    except OSError:
        return []
    return [
        folder.name
        for folder in folders
        if folder.name.startswith(incomplete) and (folder / MANIFEST).is_file()
    ]


def complete_models(context: typer.Context, incomplete: str) -> list[str]:
    """Products, and the run's teacher."""
    named = complete_products(context, incomplete)
    return [*named, TEACHER] if TEACHER.startswith(incomplete) else named


def complete_recipes(incomplete: str) -> list[str]:
    """The recipes that come with mmmamba."""
    from mmmamba_cli.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]
