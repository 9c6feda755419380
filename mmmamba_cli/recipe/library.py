"""The recipes that come with the package, by name."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe.problems import join_or, nearest

SUFFIX = ".yaml"
# What the folder `recipes` at the top of the repository is called where it is installed.
INSTALLED = "mmmamba_recipes"


def recipe_folder() -> Traversable:
    """Where the shipped recipes lie: beside the package in a checkout, else as package data.

    The checkout comes first: its code must not read the recipes of another version that is
    installed too, and importlib.resources cannot read those of an editable install, whose
    namespace is a hook and no folder. Raises RecipeError if an installation lacks them.
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
    """The YAML file of a shipped recipe. Raises RecipeError naming those that there are."""
    names = recipe_names()
    if name not in names:
        raise RecipeError(
            f"no recipe is called {name}: give {join_or(names)}, or the path of a .yaml file"
            f"{nearest(name, names)}"
        )
    return recipe_folder() / f"{name}{SUFFIX}"
