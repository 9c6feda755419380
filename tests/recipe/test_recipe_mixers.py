"""The mixer of each layer in a recipe: `mixer.kind`, `layers.mixers` and options of mixers."""

from __future__ import annotations

import pytest
from ended import Command

from mmmamba_cli.architecture import LINEAR, MixerConfig, default_mixer, mixer_specs
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe import layer_mixers, load_recipe, mixer_options
from mmmamba_cli.recipe.mixers import KINDS, Mixer

FAULTS = {
    "unknown mixer": (
        "mixer.kind=gated_dleta",
        f"mixer.kind: is 'gated_dleta', must be one of {', '.join(KINDS)}; did you mean "
        "gated_delta?",
    ),
    "attention is no kind": (
        "mixer.kind=attention",
        f"mixer.kind: is 'attention', must be one of {', '.join(KINDS)}",
    ),
    "option that no mixer has": (
        "mixer.window=128",
        "mixer.window: is 128, but Mamba-2 has no such option",
    ),
    "layers of no mixer": (
        "layers.mixers={gated: [0]}",
        f"layers.mixers.gated: unknown mixer, must be one of {', '.join(KINDS)}; did you mean "
        "gated_delta?",
    ),
    "layer named by two": (
        "layers.mixers={gated_delta: [0, 2], kda: [1, 2]}",
        "layers.mixers.kda[1]: is 2, which gated_delta names already",
    ),
    "layer named twice": (
        "layers.mixers={kda: [1, 1]}",
        "layers.mixers.kda[1]: is 1, which stands at [0] already; name a layer once",
    ),
    "no list": (
        "layers.mixers={kda: 3}",
        "layers.mixers.kda: is 3, must be a list of layer indices, counted from 0",
    ),
    "no section": (
        "layers.mixers=[kda]",
        "layers.mixers: is ['kda'], must be a section that gives ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence(mmmamba: Command, fault: str) -> None:
    assignment, sentence = FAULTS[fault]
    done = mmmamba("recipe", "validate", "smoke", "--set", assignment)
    assert done.code == 2
    assert done.err.startswith(f"error: --set: {sentence}")
    assert len(done.err.splitlines()) == 1


def test_a_layer_that_the_model_lacks(mmmamba: Command) -> None:
    words = ("recipe", "validate", "smoke", "--set", "layers.mixers={gated_delta: [0, 8]}")
    assert mmmamba(*words, "--num-layers", 9).code == 0
    done = mmmamba(*words, "--num-layers", 8)
    assert done.code == 2
    assert "smoke: layers.mixers.gated_delta[1]: is 8" in done.err
    with pytest.raises(RecipeError, match=r"^layers.mixers.kda\[0\]: is 3"):
        layer_mixers("gla", {"kda": (3,)}, 3)


def test_layers_and_their_mixers() -> None:
    sets = ["mixer.kind=kda", "layers.mixers={gla: [3, 1]}", "mixer.qk_norm=true"]
    recipe = load_recipe("smoke", sets)
    assert recipe.layers.mixers == {"gla": (1, 3)}
    assert hash(recipe) == hash(load_recipe("smoke", sets))
    mixers = layer_mixers(recipe.mixer.kind, recipe.layers.mixers, 5)
    assert mixers == ["kda", "gla", "kda", "gla", "kda"]
    assert mixer_options(recipe.mixer) == MixerConfig(qk_norm=True)
    assert load_recipe("smoke").mixer.kind == default_mixer(LINEAR)


def test_an_option_is_read_by_some_mixer() -> None:
    """An option counts if a mixer of a single layer reads it."""
    for option in MixerConfig.__dataclass_fields__:
        assert option in Mixer.model_fields
        assert [n for n, spec in mixer_specs().items() if n in KINDS and option in spec.options]
    recipe = load_recipe("smoke", ["layers.mixers={window: [0]}", "mixer.window=128"])
    assert recipe.mixer.window == 128
