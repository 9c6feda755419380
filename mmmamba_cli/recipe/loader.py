"""Recipe loader: files and shipped recipes, `--set` assignments and command-line overrides.

Precedence: command line, then `--set section.field=value`, then the recipe, then defaults.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe.problems import (
    Location,
    Problem,
    format_location,
    format_value,
    join_or,
    suggest,
    validation_problems,
)
from mmmamba_cli.recipe.schema import Recipe
from mmmamba_cli.recipe.yaml_text import read_yaml, write_yaml

SUFFIX = ".yaml"
# Package name of the repository's folder `recipes` in an installation.
INSTALLED = "mmmamba_recipes"


def recipe_folder() -> Traversable:
    """Folder of the shipped recipes: `recipes` of a checkout, else package data.

    The checkout comes first, since its code must not read the recipes of another installed version,
    and importlib.resources cannot read an editable install, whose namespace is an import hook.
    Raises RecipeError if the installation has no recipes.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file() and (root / "recipes").is_dir():
        return root / "recipes"
    try:
        return resources.files(INSTALLED)
    except ModuleNotFoundError:
        raise RecipeError(
            "the shipped recipes are not installed", hint="reinstall the package mmmamba"
        ) from None


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    names = (item.name for item in recipe_folder().iterdir())
    return sorted(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))


def shipped_recipe(name: str) -> Traversable:
    """The YAML file of a shipped recipe. Raises RecipeError, listing the names, if unknown."""
    names = recipe_names()
    if name not in names:
        raise RecipeError(
            f"no recipe is called {name}: give {join_or(names)}, or the path of a .yaml file"
            f"{suggest(name, names)}"
        )
    return recipe_folder() / f"{name}{SUFFIX}"


SET_OPTION = "--set"
COMMAND_LINE = "command line"
FIELD_PATTERN = re.compile(r"[\w-]+(\[\d+\])*(\.[\w-]+(\[\d+\])*)*")
FIELD_PART_PATTERN = re.compile(r"\[(\d+)\]|([\w-]+)")


def load_recipe(
    name_or_path: str | Path, sets: Iterable[str] = (), overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Load a shipped recipe by name, or a YAML file, and apply `sets` and `overrides`.

    `sets` are texts like `stages[2].lr=1e-5` or `stages.stage3.lr=1e-5`, with YAML values.
    `overrides` maps the same field names to values and takes precedence; leave out options that
    were not passed.

    Raises:
        RecipeError: one line per problem, `file: section.field: problem, allowed values`.
    """
    file = find_recipe(name_or_path)
    label = str(name_or_path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"{label}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{label}: is a folder, must be a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{label}: not text in UTF-8 (byte {error.start})") from None
    return parse_recipe(text, label, sets, overrides)


def parse_recipe(
    text: str,
    source: str,
    sets: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """Parse YAML text as `load_recipe` does; `source` names the text in errors."""
    tree = read_yaml(text, source)
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else f"is {format_value(tree)}"
        keys = ", ".join(Recipe.model_fields)
        raise RecipeError(f"{source}: {what}, must be a section with the keys {keys}")
    changes: list[tuple[Location, str]] = []
    for assignment in sets:
        field, value = _split_assignment(assignment)
        changes.append((_assign(tree, field, value, SET_OPTION), SET_OPTION))
    for field, value in (overrides or {}).items():
        changes.append((_assign(tree, field, value, COMMAND_LINE), COMMAND_LINE))
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [
            problem.line(_source_of(problem, changes, source))
            for problem in validation_problems(error, Recipe)
        ]
        raise RecipeError("\n".join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML, including defaults; `parse_recipe` restores it."""
    return write_yaml(recipe.model_dump(mode="json"))


def find_recipe(name_or_path: str | Path) -> Path | Traversable:
    """Resolve a path or a name: a path, else a shipped recipe, else a file of that name."""
    path = Path(name_or_path).expanduser()
    if isinstance(name_or_path, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        return path
    if name_or_path not in recipe_names() and path.is_file():
        return path
    return shipped_recipe(name_or_path)


def _source_of(problem: Problem, changes: list[tuple[Location, str]], file: str) -> str:
    """Source of an invalid value: the last change of its field, an outer or an inner field."""
    for location, source in reversed(changes):
        if all(a == b for a, b in zip(location, problem.location, strict=False)):
            return source
    return file


def _split_assignment(assignment: str) -> tuple[str, Any]:
    field, equals, value = assignment.partition("=")
    if not equals:
        raise RecipeError(
            f"{SET_OPTION}: is {format_value(assignment)}, must be section.field=value, "
            "such as data.max_length=4096"
        )
    return field.strip(), read_yaml(value, f"{SET_OPTION} {field.strip()}")


def _split_field(field: str, source: str) -> Location:
    if not FIELD_PATTERN.fullmatch(field):
        raise RecipeError(
            f"{source}: {format_value(field)} is no field, "
            "must be like data.max_length or stages[2].lr"
        )
    return tuple(
        int(match[1]) if match[1] is not None else match[2]
        for match in FIELD_PART_PATTERN.finditer(field)
    )


def _assign(tree: dict[str, Any], field: str, value: Any, source: str) -> Location:
    """Assign `value` to `field`, creating missing sections; return its location."""
    parts = _split_field(field, source)
    node: Any = tree
    location: Location = ()
    for position, part in enumerate(parts):
        key = _key_in(node, part, location, source)
        location = (*location, key)
        if position == len(parts) - 1:
            node[key] = value
            break
        if isinstance(node, dict) and node.get(key) is None:
            if isinstance(parts[position + 1], int):
                raise RecipeError(
                    f"{source}: {format_location(location)}: has no entries in the recipe, "
                    "must be set as a whole list"
                )
            node[key] = {}
        node = node[key]
    return location


def _key_in(node: Any, part: str | int, location: Location, source: str) -> str | int:
    """Key of dict `node`, or index of list `node`, for one part of a field name."""
    where = format_location(location)
    if isinstance(node, dict):
        if isinstance(part, str):
            return part
        raise RecipeError(f"{source}: {where}: is a section, [{part}] is no key of it")
    if not isinstance(node, list):
        needed = f"a section to set {part}" if isinstance(part, str) else f"a list to set [{part}]"
        raise RecipeError(f"{source}: {where}: is {format_value(node)}, must be {needed}")
    if isinstance(part, str) and part.isdecimal():
        part = int(part)
    names = [item.get("name") if isinstance(item, dict) else None for item in node]
    if isinstance(part, str):
        if part in names:
            return names.index(part)
        known = join_or([str(name) for name in names if name is not None])
        hint = f"must be {known}" if known else "must be an index such as [0]"
        raise RecipeError(f"{source}: {where}.{part}: names no entry, {hint}")
    if part >= len(node):
        named = [f"[{i}]" if name is None else f"[{i}] {name}" for i, name in enumerate(names)]
        raise RecipeError(
            f"{source}: {where}[{part}]: there are {len(node)} entries, "
            f"must be {join_or(named) or 'set as a whole list'}"
        )
    return part
