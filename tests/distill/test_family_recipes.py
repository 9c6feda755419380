"""The recipes of other teachers fit their families: each stage has parameters its loss reaches."""

from __future__ import annotations

import pytest
from families import FAMILIES, LAYERS

from mmmamba_cli.distill.stage_shapes import in_place_shapes
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.teachers import StudentPlan, student_config

FAMILY_OF = {
    "qwen3-vl-hybrid": "qwen3_vl",
    "qwen3-vl-linear": "qwen3_vl",
    "smolvlm-hybrid": "smolvlm",
}


@pytest.mark.parametrize("name", FAMILY_OF)
def test_stages_of_a_recipe_fit_its_family(name: str) -> None:
    config = student_config(FAMILIES[FAMILY_OF[name]].config(), StudentPlan.of_layers(LAYERS))
    linear = in_place_shapes(config)
    # A quarter of the tiny model's layers.
    hybrid = linear.with_attention((0,) if name.endswith("hybrid") else ())
    for stage in load_recipe(name).stages:
        shapes = hybrid if stage.layers == "planned" else linear
        names, _ = shapes.trainable(stage)
        assert names and all(".vision" not in one and "visual" not in one for one in names)
        assert shapes.objective(stage, names).terms
        mixers = {one for one in names if ".self_attn." in one}
        others = set(names) - mixers
        is_whole = name.startswith("smolvlm") and stage.loss == "kl"
        assert mixers and bool(others) is is_whole
