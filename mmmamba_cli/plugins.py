"""Plugins of other packages, found through entry points.

Groups: `mmmamba.suites`, `mmmamba.evaluators`, `mmmamba.commands`, `mmmamba.models`,
`mmmamba.corpora`. In a checkout,
the project's own entry points come from its pyproject.toml instead of the installed metadata, which
may be those of another version.
"""

from __future__ import annotations

import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

from mmmamba_cli.errors import MmmambaError

PROJECT = "mmmamba"

Loader = Callable[[], Any]


def entry_points(group: str) -> Iterator[tuple[str, Loader]]:
    """Yield (name, loader) for each entry point of a group, the project's own first.

    A loader of another package raises `MmmambaError` that names the package if its code fails.
    """
    root = _checkout()
    if root is not None:
        yield from _checkout_entries(root, group)
    for entry in _installed(group, tuple(sys.path)):
        own = entry.dist is not None and entry.dist.name == PROJECT
        if not own:
            yield entry.name, partial(_load_plugin, entry, entry.load)
        elif root is None:
            yield entry.name, entry.load


def entry_point_values(group: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, object) for each entry point of a group; a function is called for its object.

    Raises `MmmambaError` that names the package if the code of another package fails.
    """
    for name, load in entry_points(group):
        found = load()
        if not callable(found):
            yield name, found
        elif isinstance(load, partial):
            yield name, _load_plugin(load.args[0], found)
        else:
            yield name, found()


def _load_plugin(entry: metadata.EntryPoint, load: Loader) -> Any:
    """`load()` of another package's entry point; its failure is not a bug of this package."""
    try:
        return load()
    except MmmambaError:
        raise
    except Exception as error:
        package = entry.value if entry.dist is None else entry.dist.name
        if isinstance(error, SyntaxError):
            place = f"{error.filename}:{error.lineno}"
        else:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename}:{last.lineno}"
        raise MmmambaError(
            f"package {package}: its entry point {entry.name} = {entry.value} in {entry.group} "
            f"cannot be loaded: {type(error).__name__}: {error} at {place}",
            f"mend {package}, or uninstall it",
        ) from error


@cache
def _installed(group: str, path: tuple[str, ...]) -> list[metadata.EntryPoint]:
    """The entry points of installed packages; a search reads the metadata of every package.

    Packages are found along `sys.path`, whose value is `path`.
    """
    return sorted(metadata.entry_points(group=group), key=lambda e: (e.name, e.value))


def load_reference(reference: str) -> Any:
    """Import the object `package.module:attribute`, also from the packages of a checkout.

    Raises ImportError or AttributeError.
    """
    module, _, attribute = reference.partition(":")
    root = _checkout()
    if root is None:
        return getattr(import_module(module), attribute)
    return _loader(root, _folders(_config(root)), module, attribute)()


def _checkout() -> Path | None:
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


@cache
def _config(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def _folders(config: dict[str, Any]) -> dict[str, str]:
    folders: dict[str, str] = config["tool"]["setuptools"]["package-dir"]
    return folders


def _checkout_entries(root: Path, group: str) -> Iterator[tuple[str, Loader]]:
    config = _config(root)
    for name, value in config["project"].get("entry-points", {}).get(group, {}).items():
        module, _, attribute = value.partition(":")
        yield name, _loader(root, _folders(config), module, attribute)


def _loader(root: Path, folders: dict[str, str], module: str, attribute: str) -> Loader:
    def load() -> Any:
        package = module.partition(".")[0]
        if package in folders:
            _import_package(package, root / folders[package])
        return getattr(import_module(module), attribute)

    return load


def _import_package(package: str, folder: Path) -> None:
    """Import a package from a folder of another name, as in an installation."""
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
