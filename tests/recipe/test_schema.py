"""Recipe schema: every field is documented, bounded, strict and frozen."""

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from mmmamba_cli.recipe import PLACEMENTS, Recipe, Stage, schema, stage_schema
from mmmamba_cli.recipe.problems import format_location, validation_problems

SECTIONS = (
    schema.Recipe,
    schema.Layers,
    schema.Mixer,
    schema.Data,
    stage_schema.Stage,
    stage_schema.Schedule,
    stage_schema.Optimiser,
    stage_schema.KL,
    stage_schema.LoRA,
)
STAGE: dict[str, Any] = {
    "name": "s",
    "learns": "new",
    "loss": "mixer-mse",
    "inputs": "teacher",
    "steps": 10,
    "batch_size": 4,
    "lr": 1e-3,
}
KL_STAGE = {**STAGE, "loss": "kl", "inputs": "student"}


def fields() -> list[tuple[type[BaseModel], str]]:
    return [(section, name) for section in SECTIONS for name in section.model_fields]


def problems(model: type[BaseModel], values: Any) -> list[tuple[str, str]]:
    try:
        model.model_validate(values)
    except ValidationError as error:
        return [
            (format_location(p.location), p.sentence) for p in validation_problems(error, model)
        ]
    return []


@pytest.mark.parametrize(("section", "name"), fields())
def test_every_field_has_a_description_and_allowed_values(
    section: type[BaseModel], name: str
) -> None:
    assert section.model_fields[name].description
    complete = {"stages": [STAGE]} if section is Recipe else STAGE if section is Stage else {}
    for wrong in (object(), [object()], {"what": 1}):
        found = problems(section, {**complete, name: wrong})
        assert found, "anything goes"
        assert all(where.startswith(name) for where, _ in found)
        assert all("must be" in what or "allowed are" in what for _, what in found)


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_frozen_and_refuse_unknown_keys(section: type[BaseModel]) -> None:
    assert section.model_config["frozen"]
    ((_, what),) = [p for p in problems(section, {"whta": 1}) if p[0] == "whta"]
    assert what.startswith(f"unknown key, allowed are {', '.join(section.model_fields)}")


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.model_validate({"stages": [STAGE]})
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.stages[0].optimiser.clip = 1.0
    assert hash(recipe) == hash(Recipe.model_validate({"stages": [STAGE]}))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("steps", [0, -1, 1.0, "10", True, None, 10**9 + 1]),
        ("batch_size", [0, 2.0, 2**20 + 1]),
        ("lr", [0, -1e-3, 1.1, float("nan"), float("inf"), "1e-3", True, None]),
        ("loss_scale", [0, float("inf")]),
        ("accumulation", [0, 3, -1, 2.0, True, "2", "all", None, 2**20 + 1]),
        ("max_length", [1, 8192.0]),
        ("precision", ["fp16", None]),
        ("loss", ["mse"]),
        ("inputs", ["both"]),
        ("layers", ["hybrid"]),
        ("trainable", ["all"]),
        ("evaluate_every", [0]),
        ("save_every", [0]),
        ("name", ["", "1", "A", "a b", "a/b", "a.b", 1, "é"]),
        ("learns", ["", "qkv", [], [""], [1], None]),
        ("schedule", [{"kind": "linear"}, {"warmup": 1.1}, {"warmup": -0.1}, {"final": 2}, None]),
        ("schedule", [{"warmup": 0.6, "decay": 0.5}]),
        (
            "optimiser",
            [
                {"betas": [0.9, 1.0]},
                {"betas": [-0.1, 0.9]},
                {"betas": [0.9]},
                {"betas": [0.9, 0.9, 0.9]},
                {"betas": 0.9},
                {"weight_decay": -0.1},
                {"weight_decay": 1.0},
                {"clip": 0.0},
                {"eps": 0.0},
            ],
        ),
        ("kl", [{}]),
        ("lora", [{}]),
    ],
)
def test_a_stage_refuses(field: str, values: list[Any]) -> None:
    assert not problems(Stage, STAGE)
    for value in values:
        found = problems(Stage, {**STAGE, field: value})
        assert found and found[0][0].startswith(field), (value, found)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("inputs", ["teacher"]),
        ("kl", [{"reduction": "mean"}, {"mask": "image"}, {"direction": "both"}]),
        ("kl", [{"reduction": "paper", "mask": "answer"}]),
        ("kl", [{"temperature": 0}, {"temperature": 101.0}, {"ce_weight": 1.5}]),
        ("lora", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": []}]),
    ],
)
def test_a_kl_stage_refuses(field: str, values: list[Any]) -> None:
    assert not problems(Stage, {**KL_STAGE, "kl": {"ce_weight": 0.1}, "lora": {"rank": 4}})
    for value in values:
        found = problems(Stage, {**KL_STAGE, field: value})
        assert found and found[0][0].startswith(field), (value, found)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("layers", [{"attention": -1}, {"attention": True}, {"attention": 1.0}]),
        ("layers", [{"attention": "8"}, {"attention": None}, {"placement": "middle"}]),
        ("layers", [{"attention": [0, 0]}, {"attention": [-1]}, {"attention": [True]}]),
        ("mixer", [{"conv_width": 0}, {"conv_width": 17}, {"rope": 1}, {"init": "mimic"}]),
        ("data", [{"max_length": 1}, {"max_bad_share": 1.5}, {"max_bad_share": -0.1}]),
        ("data", [{"train": ""}, {"batching": "none"}, {"workers": -1}, {"max_tiles": 0}]),
        ("data", [{"shuffle": "yes"}, {"shuffle_seed": -1}, {"image_root": 3}]),
        ("teacher", [""]),
        ("seed", [-1, 2**32, 0.0]),
        ("stages", [[], None, {}]),
    ],
)
def test_a_recipe_refuses(section: str, values: list[Any]) -> None:
    for value in values:
        found = problems(Recipe, {"stages": [STAGE], section: value})
        assert found and found[0][0].startswith(section), (value, found)


def test_placements_of_the_schema_match_the_functions() -> None:
    assert get_args(schema.Placement) == tuple(PLACEMENTS)


def test_stage_names_are_unique_and_layers_stay_planned() -> None:
    planned = {**STAGE, "layers": "planned"}
    assert problems(Recipe, {"stages": [STAGE, STAGE]}) == [
        ("stages[1].name", "is s, which names stages[0] already")
    ]
    assert problems(Recipe, {"stages": [planned, {**STAGE, "name": "t"}]}) == [
        ("stages[1].layers", "is all, must be planned: an earlier stage restored attention")
    ]
    assert not problems(Recipe, {"stages": [STAGE, {**planned, "name": "t"}]})


def test_a_kl_stage_shows_its_settings_and_no_other_has_them() -> None:
    assert Stage.model_validate(KL_STAGE).kl == stage_schema.KL()
    assert Stage.model_validate({**KL_STAGE, "kl": None}).kl == stage_schema.KL()
    assert Stage.model_validate(STAGE).kl is None


def test_only_wsd_limits_the_decay_by_the_warmup() -> None:
    shares = {"warmup": 0.95, "decay": 0.1}
    assert problems(stage_schema.Schedule, shares) == [
        ("decay", "is 0.1, must be at most 1 - warmup = 0.05")
    ]
    assert not problems(stage_schema.Schedule, {**shares, "kind": "cosine"})


def test_every_invalid_entry_is_named_without_its_list() -> None:
    found = problems(Recipe, {"stages": [3, {**STAGE, "lr": 0}]})
    assert [where for where, _ in found] == ["stages[0]", "stages[1].lr"]
