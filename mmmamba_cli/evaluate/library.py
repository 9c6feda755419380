"""Installed suites, their tables, and adapters to other evaluation kits.

A package adds suites with an entry point in the group `mmmamba.suites` that names a folder of YAML
files, or a function that returns one, and adapters to other kits in `mmmamba.evaluators`.
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
from mmmamba_cli.plugins import Loader, entry_point_values, entry_points, load_reference
from mmmamba_cli.recipe.problems import join_or, suggest

SUITES = "mmmamba.suites"
EVALUATORS = "mmmamba.evaluators"
SUFFIX = ".yaml"
PUBLISHED = "published.yaml"
# The folder of tables, as in VLMEvalKit.
DATA_VARIABLE = "LMUData"
DEFAULT_DATA_FOLDER = Path("~/LMUData")
LOCAL_SUFFIX = "_local"
CACHE = Path("mmmamba") / "suites"


def suite_names() -> list[str]:
    """Names of all installed suites, sorted."""
    return sorted(_suite_files())


def find_suite(name: str) -> Suite:
    """The suite of that name. Raises `DataError` that lists the known names and the nearest."""
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
    """Tables of published results from the suite folders: source, and rows by model."""
    found = []
    for folder in _suite_folders():
        file = folder / PUBLISHED
        if file.is_file():
            found += yaml.safe_load(file.read_text(encoding="utf-8-sig"))["tables"]
    return found


def find_evaluator(name: str) -> Callable[..., Any]:
    """The adapter to another evaluation kit. Raises `DataError` that lists the known ones."""
    known: dict[str, Loader] = {}
    for entry, load in entry_points(EVALUATORS):
        known.setdefault(entry, load)
    if name not in known:
        raise DataError(
            f"--with {name} is not known: give {join_or(sorted(known)) or 'nothing, none is there'}"
            f"{suggest(name, known)}"
        )
    found: Callable[..., Any] = known[name]()
    return found


def data_folder(data: Path | None) -> Path:
    """The folder of tables: `data`, else `$LMUData`, else ~/LMUData."""
    return data or Path(os.environ.get(DATA_VARIABLE) or DEFAULT_DATA_FOLDER).expanduser()


def existing_table(suite: Suite, data: Path | None) -> Path | None:
    """The suite's TSV in the data folder, if it is there."""
    folder = data_folder(data)
    places = [folder / f"{suite.dataset}{ending}.tsv" for ending in ("", LOCAL_SUFFIX)]
    return next((place for place in places if place.is_file()), None)


def find_table(
    suite: Suite, data: Path | None, say: Callable[[str], None] = lambda text: None
) -> Path:
    """The suite's TSV, built first if the suite has a `build` function and `data` is None.

    Raises `DataError` that names the places searched.
    """
    found = existing_table(suite, data)
    if found is None and suite.build and data is None:
        found = built_table(suite, say)
    if found is None:
        raise DataError(
            f"suite {suite.name} needs {suite.dataset}.tsv, which is not in {data_folder(data)}; "
            f"it is looked for in --data DIR, else ${DATA_VARIABLE}, else {DEFAULT_DATA_FOLDER}",
            "without --data the suite writes its table itself"
            if suite.build
            else "it is VLMEvalKit's table: tab-separated, with the columns "
            f"{', '.join(suite.columns)} and image (base64, or another row's index) or image_path",
        )
    return found


def cache_folder() -> Path:
    """The folder of built tables: `$XDG_CACHE_HOME`/mmmamba/suites, else below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / CACHE


def built_table(suite: Suite, say: Callable[[str], None]) -> Path:
    """The suite's table in the cache, built once per version of the suite and of this package.

    Building can take a minute; `say` announces it. Raises `DataError` if the build function cannot
    be imported.
    """
    folder = cache_folder() / f"{suite.name}-{mmmamba_cli.__version__}-{suite.digest}"
    table = folder / f"{suite.dataset}.tsv"
    if not table.is_file():
        try:
            build = load_reference(suite.build)
        except Exception as error:
            # Importing runs code of another package, which may raise anything.
            raise DataError(
                f"suite {suite.name} cannot build its table: {type(error).__name__}: {error}"
            ) from error
        say(f"making the table of suite {suite.name}, once, in {folder}")
        with atomic_folder(folder, overwrite=True) as partial:
            build(partial)
    return table


@cache
def _suite_files() -> dict[str, Traversable]:
    files: dict[str, Traversable] = {}
    for folder in _suite_folders():
        for item in folder.iterdir():
            if item.name.endswith(SUFFIX) and item.name != PUBLISHED:
                # Suites of this project come first: a plugin cannot replace one.
                files.setdefault(item.name.removesuffix(SUFFIX), item)
    if not files:
        raise DataError("no suites are installed", "reinstall the package mmmamba")
    return files


def _suite_folders() -> Iterator[Traversable]:
    for name, found in entry_point_values(SUITES):
        folder = Path(found) if isinstance(found, str) else found
        if not isinstance(folder, Traversable) or not folder.is_dir():
            raise DataError(
                f"the entry point {name} in {SUITES} gives {found!r}, which is not a folder",
                "it names the folder of the suites' YAML files, or a function that returns it",
            )
        yield folder
