"""The suites and adapters there are, found through entry points.

A package adds suites with an entry point in the group `mmmamba.suites` that leads to a folder of
YAML files, or to a function that returns one, and adapters to other kits in `mmmamba.evaluators`.
In a checkout the project's own entry points are read from its pyproject.toml, ahead of those of
what is installed: its code must not run with the suites of another version.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module, metadata, util
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate.suite import Suite, parse_suite
from mmmamba_cli.recipe.problems import join_or, nearest

SUITES = "mmmamba.suites"
EVALUATORS = "mmmamba.evaluators"
PROJECT = "mmmamba"
SUFFIX = ".yaml"
PUBLISHED = "published.yaml"

Load = Callable[[], Any]


def suite_names() -> list[str]:
    """Names of all suites, sorted."""
    return sorted(_suite_files())


def find_suite(name: str) -> Suite:
    """A suite by its name. Raises `DataError` that names those there are, and the nearest."""
    files = _suite_files()
    if name not in files:
        names = sorted(files)
        raise DataError(f"no suite is called {name}: give {join_or(names)}{nearest(name, names)}")
    file = files[name]
    suite = parse_suite(file.read_text(encoding="utf-8"), f"suite {file}")
    if suite.name != name:
        raise DataError(f"suite {file} calls itself {suite.name}", f"its name must be {name}")
    return suite


def published_rows() -> list[dict[str, Any]]:
    """The tables of published results that lie beside the suites: source, rows by model."""
    found = []
    for folder in _suite_folders():
        file = folder / PUBLISHED
        if file.is_file():
            found += yaml.safe_load(file.read_text(encoding="utf-8"))["tables"]
    return found


def find_evaluator(name: str) -> Callable[..., Any]:
    """The adapter to another kit. Raises `DataError` naming those there are."""
    known: dict[str, Load] = {}
    for entry, load in _entries(EVALUATORS):
        known.setdefault(entry, load)
    if name not in known:
        raise DataError(
            f"--with {name} is not known: give {join_or(sorted(known)) or 'nothing, none is there'}"
            f"{nearest(name, known)}"
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
    for _, load in _entries(SUITES):
        found = load()
        folder = found() if callable(found) else found
        yield Path(folder) if isinstance(folder, str) else folder


def _entries(group: str) -> Iterator[tuple[str, Load]]:
    """(name, how to load it) of each entry point; the project's own first."""
    root = _checkout()
    if root is not None:
        yield from _checkout_entries(root, group)
    for entry in sorted(metadata.entry_points(group=group), key=lambda e: (e.name, e.value)):
        own = entry.dist is not None and entry.dist.name == PROJECT
        if not (own and root is not None):
            yield entry.name, entry.load


def _checkout() -> Path | None:
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


def _checkout_entries(root: Path, group: str) -> Iterator[tuple[str, Load]]:
    config = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    folders = config["tool"]["setuptools"]["package-dir"]
    for name, value in config["project"].get("entry-points", {}).get(group, {}).items():
        module, _, attribute = value.partition(":")
        yield name, _loader(root, folders, module, attribute)


def _loader(root: Path, folders: dict[str, str], module: str, attribute: str) -> Load:
    def load() -> Any:
        package = module.partition(".")[0]
        _import_from(package, root / folders.get(package, package))
        return getattr(import_module(module), attribute)

    return load


def _import_from(package: str, folder: Path) -> None:
    """Import a package from a folder of another name, as an installation would find it."""
    there = sys.modules.get(package)
    if there is not None and Path(str(there.__file__)).parent == folder:
        return
    spec = util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    made = util.module_from_spec(spec)
    sys.modules[package] = made
    spec.loader.exec_module(made)
