"""Shipped recipes: loading, published numbers, installation."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe import (
    Recipe,
    attention_layers,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
)
from mmmamba_cli.recipe.loader import shipped_recipe

ROOT = Path(__file__).parents[2]
HOVLE_LAYERS = 32


def test_the_names_are_the_files_at_the_top() -> None:
    assert recipe_names() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert {"mmmamba-hybrid", "mmmamba-linear", "smoke"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_and_its_dump_loads_back(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    assert parse_recipe(dump_recipe(recipe), "dump") == recipe


@pytest.mark.parametrize("name", ["mmmamba-linear", "mmmamba-hybrid"])
def test_the_published_numbers(name: str) -> None:
    recipe = load_recipe(name)
    stages = recipe.stages
    assert [stage.learns for stage in stages] == ["new", "new+qkv", "new+qkv"]
    assert [stage.loss for stage in stages] == ["mixer-mse", "mixer-mse", "kl"]
    assert [stage.inputs for stage in stages] == ["teacher", "teacher", "student"]
    assert [stage.layers for stage in stages] == ["all", "all", "planned"]
    assert [stage.batch_size for stage in stages] == [128, 128, 64]
    assert [stage.steps for stage in stages] == [20_000] * 3
    assert [stage.lr for stage in stages] == [1e-3, 5e-4, 5e-5]
    assert [stage.loss_scale for stage in stages] == [1000, 1000, 1]
    for stage in stages:
        assert stage.optimiser.betas == (0.9, 0.999)
        assert stage.optimiser.weight_decay == 0.05
        assert stage.optimiser.clip == 5.0
        assert stage.schedule.kind == "wsd"
        assert (stage.schedule.warmup, stage.schedule.decay) == (0.1, 0.1)
        assert stage.precision == "bf16"
    assert stages[2].kl is not None
    assert (stages[2].kl.direction, stages[2].kl.temperature) == ("forward", 1.0)
    assert recipe.data.max_length == 8192
    assert recipe.mixer.init == "inherit+mimic"
    assert (recipe.mixer.conv_width, recipe.mixer.d_skip) == (2, False)
    assert (recipe.mixer.qk_norm, recipe.mixer.rope) == (False, False)


def test_the_published_students_differ_in_their_layers_only() -> None:
    linear, hybrid = load_recipe("mmmamba-linear"), load_recipe("mmmamba-hybrid")
    assert attention_layers(linear.layers, HOVLE_LAYERS) == ()
    assert attention_layers(hybrid.layers, HOVLE_LAYERS) == (0, 4, 8, 12, 16, 20, 24, 28)
    differing = {
        name for name in Recipe.model_fields if getattr(linear, name) != getattr(hybrid, name)
    }
    assert differing == {"description", "layers"}


def test_the_gated_delta_recipe_differs_in_its_mixer_only() -> None:
    linear, other = load_recipe("mmmamba-linear"), load_recipe("gated-delta-linear")
    assert other.mixer == linear.mixer.model_copy(update={"kind": "gated_delta"})
    differing = {
        name for name in Recipe.model_fields if getattr(linear, name) != getattr(other, name)
    }
    assert differing == {"description", "mixer"}


def test_the_published_recipes_leave_nothing_to_defaults_that_the_paper_gives() -> None:
    for name in ("mmmamba-linear", "mmmamba-hybrid"):
        for stage in load_recipe(name).stages:
            assert {"schedule", "optimiser", "precision"} <= stage.model_fields_set
            assert {"kind", "warmup", "decay"} <= stage.schedule.model_fields_set
            assert {"betas", "weight_decay", "clip"} <= stage.optimiser.model_fields_set


def test_the_recipes_of_other_teachers_have_a_quarter_of_attention() -> None:
    """Of the text layers of Qwen3-VL-2B, -4B and -8B, and of SmolVLM2-256M, -500M and -2.2B."""
    for name, layers, sets in (
        ("qwen3-vl-hybrid", 28, []),
        ("qwen3-vl-hybrid", 36, ["layers.attention=9"]),
        ("smolvlm-hybrid", 30, []),
        ("smolvlm-hybrid", 32, []),
        ("smolvlm-hybrid", 24, ["layers.attention=6"]),
    ):
        recipe = load_recipe(name, sets)
        kept = attention_layers(recipe.layers, layers)
        assert len(kept) == round(layers / 4)
        assert all(one.loss_weights == "density" for one in recipe.stages if one.loss != "kl")
    hybrid, linear = load_recipe("qwen3-vl-hybrid"), load_recipe("qwen3-vl-linear")
    assert attention_layers(linear.layers, 28) == ()
    assert hybrid.stages[:2] == linear.stages[:2] and hybrid.data == linear.data
    assert [one.steps for one in hybrid.stages] == [500, 1000, 1500, 500]
    assert [one.steps for one in linear.stages] == [500, 1000, 3000, 500]


def test_the_smoke_recipe_is_small() -> None:
    recipe = load_recipe("smoke")
    assert recipe.data.max_length <= 128
    assert sum(stage.steps * stage.batch_size for stage in recipe.stages) <= 32
    assert len(attention_layers(recipe.layers, 3)) == 1


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match=r"no recipe is called mmamba-linear: give .*smoke.*mean mm"
    ):
        shipped_recipe("mmamba-linear")


def _install(target: Path) -> None:
    """Installed files: the package, and the recipes as package data."""
    for module in ("__init__.py", "errors.py"):
        (target / "mmmamba_cli").mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / "mmmamba_cli" / module, target / "mmmamba_cli")
    for folder in ("recipe", "architecture"):
        shutil.copytree(ROOT / "mmmamba_cli" / folder, target / "mmmamba_cli" / folder)


def _names_seen_from(target: Path) -> subprocess.CompletedProcess[str]:
    code = "import json; from mmmamba_cli import recipe as r; r.load_recipe('smoke'); "
    code += "print(json.dumps([r.recipe_names(), str(r.recipe_folder())]))"
    # -S keeps an installed mmmamba out; its dependencies come by path.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=target,
        env={"PYTHONPATH": ":".join([str(target), *packages])},
        capture_output=True,
        text=True,
    )


def test_an_installed_package_reads_its_package_data(tmp_path: Path) -> None:
    _install(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "mmmamba_recipes")
    (tmp_path / "recipes").mkdir()  # of somebody else's package, installed beside ours
    done = _names_seen_from(tmp_path)
    assert done.returncode == 0, done.stderr
    names, folder = json.loads(done.stdout)
    assert names == recipe_names()
    assert str(tmp_path) in folder


def test_a_checkout_reads_its_own_recipes_though_others_are_installed(tmp_path: Path) -> None:
    _install(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "mmmamba_recipes").mkdir()
    done = _names_seen_from(tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [recipe_names(), str(tmp_path / "recipes")]


def test_an_installation_without_recipes_says_so(tmp_path: Path) -> None:
    _install(tmp_path)
    done = _names_seen_from(tmp_path)
    assert "RecipeError: the shipped recipes are not installed" in done.stderr
