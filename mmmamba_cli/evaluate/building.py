"""Tables that a suite makes itself, in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mmmamba_cli
from mmmamba_cli.checkpoint import atomic_folder
from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.plugins import load_reference

CACHE = Path("mmmamba") / "suites"


def cache_folder() -> Path:
    """Where built tables are kept: `$XDG_CACHE_HOME`, else `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / CACHE


def built_table(suite: Suite, say: Callable[[str], None]) -> Path:
    """The suite's table, made once for each version of the suite and of this package.

    `say` is told when that begins, since it may take a minute.

    Raises `DataError` if the function that makes it cannot be imported.
    """
    folder = cache_folder() / f"{suite.name}-{mmmamba_cli.__version__}-{suite.digest}"
    table = folder / f"{suite.dataset}.tsv"
    if not table.is_file():
        try:
            build = load_reference(suite.build)
        except (ImportError, AttributeError) as error:
            raise DataError(f"suite {suite.name} cannot build its table: {error}") from error
        say(f"making the table of suite {suite.name}, once, in {folder}")
        with atomic_folder(folder, overwrite=True) as partial:
            build(partial)
    return table
