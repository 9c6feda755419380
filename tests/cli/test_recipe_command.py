"""`mmmamba recipe list|show|validate`: text and JSON output."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe import dump_recipe, load_recipe, parse_recipe, recipe_names


def recipe(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["recipe", *arguments])


def test_list_has_a_line_for_each_recipe() -> None:
    done = recipe("list")
    assert done.exit_code == 0
    head, _, *rows = done.stdout.splitlines()
    assert head.split() == ["recipe", "attention", "stages", "steps", "description"]
    assert [row.split()[0] for row in rows] == recipe_names()
    assert ["mmmamba-hybrid", "8", "3", "60000"] in [row.split()[:4] for row in rows]


def test_list_as_json() -> None:
    listed = json.loads(recipe("list", "--json").stdout)
    assert [entry["name"] for entry in listed] == recipe_names()
    hybrid = next(entry for entry in listed if entry["name"] == "mmmamba-hybrid")
    assert hybrid["stages"] == ["stage1", "stage2", "stage3"]
    assert hybrid["attention"] == 8


def test_show_prints_a_loadable_recipe() -> None:
    done = recipe("show", "smoke", "--set", "stages.stage3.lr=1e-6", "--set", "seed=7")
    assert done.exit_code == 0
    shown = parse_recipe(done.stdout, "stdout")
    assert shown == load_recipe("smoke", ["stages.stage3.lr=1e-6", "seed=7"])
    assert shown.seed == 7
    assert done.stdout == dump_recipe(shown)


def test_show_as_json_is_the_same_recipe() -> None:
    shown = json.loads(recipe("show", "smoke", "--json").stdout)
    assert shown == load_recipe("smoke").model_dump(mode="json")


def test_show_rejects_an_invalid_recipe() -> None:
    # `main` turns the error into a sentence and exit code 2.
    done = recipe("show", "smoke", "--set", "seed=x")
    assert isinstance(done.exception, RecipeError)
    assert done.stdout == ""


@pytest.fixture
def broken(tmp_path: Path) -> str:
    path = tmp_path / "broken.yaml"
    path.write_text(dump_recipe(load_recipe("smoke")).replace("seed: 0", "seed: -1\nsede: 1"))
    return str(path)


def test_validate_lists_all_problems_and_exits_with_2(broken: str) -> None:
    done = recipe("validate", "smoke", broken)
    assert done.exit_code == 2
    assert done.stdout == "smoke: valid\n"
    assert done.stderr.splitlines() == [
        f"error: {broken}: seed: is -1, must be a whole number at least 0 and at most 4294967295",
        f"error: {broken}: sede: unknown key, allowed are description, teacher, seed, layers, "
        "mixer, data, stages; did you mean seed?",
    ]


def test_validate_as_json(broken: str) -> None:
    done = recipe("validate", "smoke", broken, "--num-layers", "6", "--json")
    assert done.exit_code == 2
    first, second = json.loads(done.stdout)
    assert first == {"recipe": "smoke", "valid": True, "problems": [], "attention_layers": [0]}
    assert (second["recipe"], second["valid"], len(second["problems"])) == (broken, False, 2)
    assert done.stderr == ""


def test_validate_places_the_attention_layers() -> None:
    done = recipe("validate", "mmmamba-hybrid", "mmmamba-linear", "--num-layers", "32")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "mmmamba-hybrid: valid, attention layers: 0, 4, 8, 12, 16, 20, 24, 28",
        "mmmamba-linear: valid, attention layers: none",
    ]


def test_validate_rejects_more_attention_layers_than_layers() -> None:
    done = recipe("validate", "mmmamba-hybrid", "--num-layers", "6")
    assert done.exit_code == 2
    assert done.stderr.startswith(
        "error: mmmamba-hybrid: layers.attention: is 8, must be from 0 to"
    )


def test_validate_applies_set_options() -> None:
    arguments = ("smoke", "--num-layers", "6", "--set", "layers.attention=[5, 1]")
    assert recipe("validate", *arguments).stdout == "smoke: valid, attention layers: 1, 5\n"
    assert recipe("validate", "smoke", "--set", "seed=x").exit_code == 2


def test_no_command_prints_help_and_a_mistyped_one_fails() -> None:
    assert recipe().exit_code == 0
    assert "validate" in recipe().stdout
    done = recipe("shwo")
    assert done.exit_code == 2
    assert "Did you mean 'show'?" in done.stderr
