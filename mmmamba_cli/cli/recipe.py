"""`mmmamba recipe`: list, show and validate recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmmamba_cli.cli.console import help_if_bare, print_error, print_json, print_table, print_text
from mmmamba_cli.cli.options import AsJson, RecipeName, Sets, complete_recipes
from mmmamba_cli.errors import RecipeError

if TYPE_CHECKING:
    from mmmamba_cli.recipe import Recipe

command = typer.Typer(
    help="List, show and validate recipes.",
    invoke_without_command=True,
    callback=help_if_bare,
)


@command.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from mmmamba_cli.recipe import load_recipe, recipe_names

    rows = [_summary(name, load_recipe(name)) for name in recipe_names()]
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("recipe", "attention", "stages", "steps", "description"),
            [
                (r["name"], r["attention"], len(r["stages"]), r["steps"], r["description"])
                for r in rows
            ],
            right=("attention", "stages", "steps"),
        )


@command.command()
def show(recipe: RecipeName, sets: Sets = None, as_json: AsJson = False) -> None:
    """Print a recipe in full, as YAML that can be loaded again.

    Defaults and --set are applied.
    """
    from mmmamba_cli.recipe import dump_recipe, load_recipe

    loaded = load_recipe(recipe, sets or ())
    if as_json:
        print_json(loaded.model_dump(mode="json"))
    else:
        print_text(dump_recipe(loaded).removesuffix("\n"))


@command.command()
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help="Names of shipped recipes, or YAML files.",
            autocompletion=complete_recipes,
        ),
    ],
    sets: Sets = None,
    num_layers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of layers of the teacher, to check the layer plan."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate recipes and list all problems.

    Exit code 2 if there are any.
    """
    results = [_check(name, sets or [], num_layers) for name in recipes]
    if as_json:
        print_json(results)
    else:
        for result in results:
            if result["valid"]:
                print_text(_describe(result))
            for problem in result["problems"]:
                print_error(problem)
    if not all(result["valid"] for result in results):
        raise typer.Exit(2)


def _summary(name: str, recipe: Recipe) -> dict[str, Any]:
    return {
        "name": name,
        "description": recipe.description,
        "attention": recipe.layers.attention,
        "stages": [stage.name for stage in recipe.stages],
        "steps": sum(stage.steps for stage in recipe.stages),
    }


def _check(name: str, sets: list[str], num_layers: int | None) -> dict[str, Any]:
    from mmmamba_cli.recipe import attention_layers, layer_mixers, load_recipe

    result: dict[str, Any] = {"recipe": name, "valid": False, "problems": []}
    try:
        recipe = load_recipe(name, sets)
    except RecipeError as error:
        return {**result, "problems": str(error).splitlines()}
    if num_layers is None:
        return {**result, "valid": True}
    try:
        layers = attention_layers(recipe.layers, num_layers)
        layer_mixers(recipe.mixer.kind, recipe.layers.mixers, num_layers)
    except RecipeError as error:
        return {**result, "problems": [f"{name}: {error}"]}
    if recipe.layers.select is not None:
        return {**result, "valid": True, "select": recipe.layers.select}
    return {**result, "valid": True, "attention_layers": layers}


def _describe(result: dict[str, Any]) -> str:
    layers = result.get("attention_layers")
    if layers is None:
        chosen = f", attention layers chosen by {result['select']}" if "select" in result else ""
        return f"{result['recipe']}: valid{chosen}"
    kept = ", ".join(str(layer) for layer in layers)
    return f"{result['recipe']}: valid, attention layers: {kept or 'none'}"
