"""Recipes: all settings of a distillation as one typed, frozen value, without torch."""

from mmmamba_cli.recipe.layers import (
    PLACEMENTS,
    SCORES_FILE_PREFIX,
    SELECTION_METHODS,
    attention_layers,
    place_attention,
    plan_kind,
)
from mmmamba_cli.recipe.loader import (
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_folder,
    recipe_names,
)
from mmmamba_cli.recipe.mixers import CALIBRATED, Mixer, layer_mixers, mixer_options
from mmmamba_cli.recipe.schema import Data, Layers, Recipe, stage_data
from mmmamba_cli.recipe.stage_schema import KL, LoRA, Optimiser, Schedule, Stage

__all__ = [
    "CALIBRATED",
    "KL",
    "PLACEMENTS",
    "SCORES_FILE_PREFIX",
    "SELECTION_METHODS",
    "Data",
    "Layers",
    "LoRA",
    "Mixer",
    "Optimiser",
    "Recipe",
    "Schedule",
    "Stage",
    "attention_layers",
    "dump_recipe",
    "layer_mixers",
    "load_recipe",
    "mixer_options",
    "parse_recipe",
    "place_attention",
    "plan_kind",
    "recipe_folder",
    "recipe_names",
    "stage_data",
]
