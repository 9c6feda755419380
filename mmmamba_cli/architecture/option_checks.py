"""Checks of the mixers and options of a config; each gives a sentence, or None."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from mmmamba_cli.architecture.mixer_spec import join_and, mixer_specs
from mmmamba_cli.architecture.model_shape import ModelShape, resolve_mixers
from mmmamba_cli.architecture.sizes import EMBEDDING_LAYERS, OPTION_RANGES, TILE_LAYERS, MixerConfig


def mixers_problem(
    layer_types: Sequence[str], mixers: Sequence[str] | None, options: MixerConfig
) -> str | None:
    """Why `mixers` do not fit the layer types or the options, as a sentence; None if they do."""
    if mixers is not None and len(mixers) != len(layer_types):
        return f"mixers has {len(mixers)} entries, but there are {len(layer_types)} layers"
    names = resolve_mixers(layer_types, mixers)
    known = mixer_specs()
    for index, (kind, name) in enumerate(zip(layer_types, names, strict=True)):
        if not isinstance(name, str) or name not in known:
            return f"mixers[{index}] is {name!r:.60}, known are {', '.join(known)}"
        if known[name].layer_type != kind:
            return f"mixers[{index}] is {name}, which is no mixer of a {kind} layer"
    used = {known[name] for name in names}
    for option in fields(MixerConfig):
        value = getattr(options, option.name)
        if value != option.default and not any(option.name in spec.options for spec in used):
            titles = join_and(sorted(spec.title for spec in used))
            return f"mixer.{option.name} is {value}, but no layer reads it ({titles})"
    return None


def options_problem(options: MixerConfig) -> str | None:
    """Why a number or a flag among the options is invalid, as a sentence; None if none is."""
    for option in fields(MixerConfig):
        value = getattr(options, option.name)
        expected = None
        if isinstance(option.default, bool):
            if not isinstance(value, bool):
                expected = "true or false"
        elif option.name in OPTION_RANGES:
            low, high = OPTION_RANGES[option.name]
            if type(value) is not int or not low <= value <= high:
                expected = f"a whole number from {low} to {high}"
        if expected is not None:
            return f"mixer.{option.name} is {value!r:.60}, expected {expected}"
    return None


def tile_options_problem(model: ModelShape) -> str | None:
    """Why the options of taps inside tiles do not fit the model; None if they do."""
    options = model.mixer_config
    if options.tile_layers not in TILE_LAYERS:
        allowed = " or ".join(TILE_LAYERS)
        return f"mixer.tile_layers is {options.tile_layers!r:.60}, expected {allowed}"
    if options.tile_layers != EMBEDDING_LAYERS and not options.tile_taps:
        return f"mixer.tile_layers is {options.tile_layers}, but mixer.tile_taps is False"
    if options.tile_taps and model.vision_config is None:
        return "mixer.tile_taps is True, but a language model without vision has no tiles"
    if options.tile_taps and options.tile_layers == EMBEDDING_LAYERS and model.embedding is None:
        return "mixer.tile_layers is embedding, but the model has no embedding stack"
    return None
