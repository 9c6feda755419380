"""The suites and adapters there are, found through entry points.

A package adds suites with an entry point in the group `mmmamba.suites` that leads to a folder of
YAML files, or to a function that returns one, and adapters to other kits in `mmmamba.evaluators`.

Tables that a suite makes itself, in the user's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

import mmmamba_cli
from mmmamba_cli.checkpoint import atomic_folder
from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate.suite import Suite, parse_suite
from mmmamba_cli.plugins import Load, entry_points, load_reference
from mmmamba_cli.recipe.problems import join_or, suggest

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


SUITES = "mmmamba.suites"
EVALUATORS = "mmmamba.evaluators"
SUFFIX = ".yaml"
PUBLISHED = "published.yaml"


def suite_names() -> list[str]:
    """Names of all suites, sorted."""
    return sorted(_suite_files())


def find_suite(name: str) -> Suite:
    """A suite by its name. Raises `DataError` that names those there are, and the nearest."""
    files = _suite_files()
    if name not in files:
        names = sorted(files)
        raise DataError(f"no suite is called {name}: give {join_or(names)}{suggest(name, names)}")
    file = files[name]
    suite = parse_suite(file.read_text(encoding="utf-8-sig"), f"suite {file}")
    if suite.name != name:
        raise DataError(f"suite {file} calls itself {suite.name}", f"its name must be {name}")
    return suite


def published_rows() -> list[dict[str, Any]]:
    """The tables of published results that lie beside the suites: source, rows by model."""
    found = []
    for folder in _suite_folders():
        file = folder / PUBLISHED
        if file.is_file():
            found += yaml.safe_load(file.read_text(encoding="utf-8-sig"))["tables"]
    return found


def find_evaluator(name: str) -> Callable[..., Any]:
    """The adapter to another kit. Raises `DataError` naming those there are."""
    known: dict[str, Load] = {}
    for entry, load in entry_points(EVALUATORS):
        known.setdefault(entry, load)
    if name not in known:
        raise DataError(
            f"--with {name} is not known: give {join_or(sorted(known)) or 'nothing, none is there'}"
            f"{suggest(name, known)}"
        )
    found: Callable[..., Any] = known[name]()
    return found


@cache
def _suite_files() -> dict[str, Traversable]:
    files: dict[str, Traversable] = {}
    for folder in _suite_folders():
        for item in folder.iterdir():
            if item.name.endswith(SUFFIX) and item.name != PUBLISHED:
                # The project's own come first, and keep their names.
                files.setdefault(item.name.removesuffix(SUFFIX), item)
    if not files:
        raise DataError("no suites are installed", "reinstall the package mmmamba")
    return files


def _suite_folders() -> Iterator[Traversable]:
    for _, load in entry_points(SUITES):
        found = load()
        folder = found() if callable(found) else found
        yield Path(folder) if isinstance(folder, str) else folder
