"""The recipe's `mixer` section, and the mixer of each layer before attention is restored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from mmmamba_cli.architecture import LINEAR, OPTION_RANGES, MixerConfig, default_mixer, mixer_specs
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe.layers import layer_list_problem
from mmmamba_cli.recipe.problems import Allowed, format_value, join_or, suggest
from mmmamba_cli.recipe.section import Section, invalid_value

# Mixers that can replace attention.
KINDS = tuple(name for name, spec in mixer_specs().items() if spec.layer_type == LINEAR)
KIND_ALLOWED = Allowed(f"one of {', '.join(KINDS)}")
LAYER_MIXERS_ALLOWED = Allowed(
    f"a section that gives {join_or(KINDS)} a list of layer indices, counted from 0"
)

# The value of `init` that needs the teacher's outputs on samples.
CALIBRATED = "calibrated"


def _check_kind(value: Any) -> str:
    if isinstance(value, str) and value in KINDS:
        return value
    hint = suggest(value, KINDS) if isinstance(value, str) else ""
    raise invalid_value(f"is {format_value(value)}, must be {KIND_ALLOWED.words}{hint}")


def _check_layer_mixers(value: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping):
        raise invalid_value(f"is {format_value(value)}, must be {LAYER_MIXERS_ALLOWED.words}")
    taken: dict[int, str] = {}
    for name, layers in value.items():
        if name not in KINDS:
            hint = suggest(str(name), KINDS)
            raise invalid_value(f"unknown mixer, must be {KIND_ALLOWED.words}{hint}", str(name))
        if not isinstance(layers, list | tuple) or any(type(layer) is not int for layer in layers):
            raise invalid_value(
                f"is {format_value(layers)}, must be a list of layer indices, counted from 0", name
            )
        problem = layer_list_problem(layers)
        if problem is not None:
            raise invalid_value(problem[1], name, problem[0])
        for position, layer in enumerate(layers):
            if layer in taken:
                raise invalid_value(
                    f"is {layer}, which {taken[layer]} names already", name, position
                )
            taken[layer] = name
    return {name: tuple(sorted(layers)) for name, layers in value.items()}


class LayerLists(dict[str, tuple[int, ...]]):
    """Layer indices by mixer; hashable, as recipes are, and never changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


MixerKind = Annotated[str, BeforeValidator(_check_kind), KIND_ALLOWED]
LayerMixers = Annotated[
    dict[str, Any],
    BeforeValidator(_check_layer_mixers),
    AfterValidator(LayerLists),
    LAYER_MIXERS_ALLOWED,
]


def default_kind() -> str:
    """The mixer of a recipe that names none."""
    return default_mixer(LINEAR)


class Mixer(Section):
    """The mixer that replaces attention, and how it begins."""

    kind: MixerKind = Field(
        default_factory=default_kind, description="What a linear layer computes."
    )
    init: Literal["scratch", "inherit", "inherit+mimic", "calibrated"] = Field(
        default="inherit+mimic",
        description="scratch: all mixer weights random; inherit: W_Q, W_K, W_V, W_O are the "
        "teacher's; inherit+mimic: the new ones also begin so that the layer resembles attention; "
        "calibrated (experimental): of these, decays and gate are fitted to the teacher's outputs "
        "on samples of data.train.",
    )
    conv_width: int = Field(
        default=2,
        ge=OPTION_RANGES["conv_width"][0],
        le=OPTION_RANGES["conv_width"][1],
        description="Taps of the causal depthwise convolution over [v, k, q].",
    )
    d_skip: bool = Field(
        default=False, description="Add D * x to the mixer's output, one D per head."
    )
    qk_norm: bool = Field(default=False, description="RMSNorm on each head of q and k.")
    rope: bool = Field(default=False, description="Rotary position embedding on q and k.")
    input_step: bool = Field(
        default=True, description="Scale what is written to the state by the step size dt."
    )
    window: int = Field(
        default=256,
        ge=OPTION_RANGES["window"][0],
        le=OPTION_RANGES["window"][1],
        description="Columns that a window sees, the last included.",
    )
    sinks: int = Field(
        default=0,
        ge=OPTION_RANGES["sinks"][0],
        le=OPTION_RANGES["sinks"][1],
        description="First columns that a window always sees.",
    )
    sink_logits: bool = Field(
        default=False, description="A learned logit per head in the denominator of a window."
    )
    tile_taps: bool = Field(
        default=False,
        description="Three more taps of the convolution, on the columns above-left, above and "
        "above-right inside a tile.",
    )
    tile_layers: Literal["embedding", "all"] = Field(
        default="embedding",
        description="Layers with these taps: those of the embedding stack, or all.",
    )


def mixer_options(section: Mixer) -> MixerConfig:
    """The options of the mixers as the model's config has them."""
    return MixerConfig(**{one.name: getattr(section, one.name) for one in fields(MixerConfig)})


def unread_option(section: Mixer, others: Mapping[str, Any]) -> tuple[str, str] | None:
    """An option that no mixer of the recipe has, and a sentence about it; None if there is none.

    `others` are the mixers of single layers.
    """
    used = [mixer_specs()[name] for name in dict.fromkeys((section.kind, *others))]
    for option in fields(MixerConfig):
        value = getattr(section, option.name)
        if value == option.default or any(option.name in spec.options for spec in used):
            continue
        titles = join_or([spec.title for spec in used])
        return option.name, f"is {format_value(value)}, but {titles} has no such option"
    return None


def mixer_problem(section: Mixer, others: Mapping[str, Any]) -> tuple[str, str] | None:
    """A field that fits none or not all of the recipe's mixers, and a sentence about it.

    `others` are the mixers of single layers. None if there is none.
    """
    problem = unread_option(section, others)
    if problem is not None:
        return problem
    sentence = _calibration_problem(section, others)
    return None if sentence is None else ("init", sentence)


def _calibration_problem(section: Mixer, others: Mapping[str, Any]) -> str | None:
    """A sentence about a mixer that `init: calibrated` cannot seed; None if there is none."""
    if section.init != CALIBRATED:
        return None
    options = mixer_options(section)
    for name in dict.fromkeys((section.kind, *others)):
        spec = mixer_specs()[name]
        if spec.is_calibrated(options):
            continue
        known = [one.title for one in mixer_specs().values() if one.is_calibrated(MixerConfig())]
        return (
            f"is {CALIBRATED}, which {join_or(known)} with input_step has and {spec.title} of this "
            "recipe has not; use inherit+mimic"
        )
    return None


def layer_mixers(kind: str, others: Mapping[str, tuple[int, ...]], num_layers: int) -> list[str]:
    """The mixer of each of `num_layers` layers before attention is restored.

    Raises:
        RecipeError: a layer that the model does not have.
    """
    found = [kind] * num_layers
    for name, layers in others.items():
        problem = layer_list_problem(layers, num_layers)
        if problem is not None:
            raise RecipeError(f"layers.mixers.{name}[{problem[0]}]: {problem[1]}")
        for layer in layers:
            found[layer] = name
    return found
