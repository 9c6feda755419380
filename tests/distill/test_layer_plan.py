"""The layer plan of a recipe and what a product has been through already."""

from __future__ import annotations

import pytest

from mmmamba_cli.distill.pipeline import check_plan, stages_to_run
from mmmamba_cli.errors import RecipeError, RunError
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.runs import Manifest

RECIPE = "mmmamba-hybrid-long"


def check(
    done: int, attention: tuple[int, ...] = (), num_layers: int = 32, planned: int = 8
) -> None:
    """Check the plan of `RECIPE`, of `planned` layers, for a product after `done` stages."""
    recipe = load_recipe(RECIPE, (), {"layers.attention": planned})
    product = Manifest(
        name="student",
        made_by="distill",
        created="",
        command="",
        content_hash="",
        parents=(),
        attention_layers=attention,
        num_layers=num_layers,
        stages=tuple(stage.name for stage in recipe.stages[:done]),
        dtype="float32",
        parameters=0,
        recipe="",
    )
    check_plan(recipe, product, stages_to_run(recipe, product, None))


def test_a_linear_student_after_a_stage_with_attention_is_refused() -> None:
    sentence = "trains stage3 with attention in 8 layers, but 'student' has done it without"
    with pytest.raises(RunError, match=sentence) as refused:
        check(3)
    assert "--stage stage3,stage4" in refused.value.hint


def test_students_that_the_plan_holds_for() -> None:
    for done in range(3):
        check(done)
    check(3, attention=(0, 4))
    check(3, planned=0)


def test_a_plan_that_does_not_fit_is_refused_before_the_first_stage() -> None:
    with pytest.raises(RecipeError):
        check(0, num_layers=4)
