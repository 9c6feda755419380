"""Subjects with random weights: an architecture by name, its teacher and its students."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mmmamba_cli.architecture import default_mixer, mixer_spec, mixer_specs
from mmmamba_cli.checkpoint import hovle
from mmmamba_cli.errors import DataError
from mmmamba_cli.model import LINEAR, HolisticVLMConfig
from mmmamba_cli.profiling.interfaces import STUDENT, Subject
from mmmamba_cli.profiling.shared_weights import WeightStore
from mmmamba_cli.profiling.subjects import baseline_roles, make_subject
from mmmamba_cli.recipe import place_attention
from mmmamba_cli.recipe.problems import join_or, suggest

# The hybrid keeps attention in one of so many layers, as in the paper.
LAYERS_PER_ATTENTION = 4
PLACEMENT = "head-interleaved"

_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def architectures() -> dict[str, dict[str, Any]]:
    """Configs by name for `random_subjects`: HoVLE as published, and a small one."""
    large = hovle.ARCHITECTURES["hovle-2.6b"]
    small = {**large, "force_image_size": 224}
    small["embedding_config"] = {
        **large["embedding_config"],
        **_SMALL,
        "num_hidden_layers": 2,
        "image_size": 224,
        "img_context_token_id": 2046,
        "llm_vocab_size": 2048,
        "llm_hidden_size": 256,
    }
    small["llm_config"] = {
        **large["llm_config"],
        **_SMALL,
        "num_hidden_layers": 6,
        "vocab_size": 2048,
    }
    return {"hovle-2.6b": large, "hovle-8m": small}


def random_subjects(
    store: WeightStore,
    name: str,
    attention: Sequence[int] | None = None,
    mixers: Sequence[str] | None = None,
    *,
    teacher: bool = True,
    seed: int = 0,
    eager: bool = False,
) -> list[Subject]:
    """An architecture with random weights: its teacher and its students.

    `attention` gives each student's number of attention layers; None is the linear student and the
    one with a quarter of the layers. `mixers` are those of their other layers, each in a student of
    its own; None is the one of a recipe that names none.

    Raises:
        DataError: for an unknown architecture or mixer.
        RecipeError: for more attention layers than there are layers.
    """
    known = architectures()
    if name not in known:
        raise DataError(
            f"no architecture is called {name}: give {join_or(sorted(known))}{suggest(name, known)}"
        )
    full = hovle.to_config(known[name], f"architecture {name}")
    layers = full.num_hidden_layers
    counts = (0, layers // LAYERS_PER_ATTENTION) if attention is None else dict.fromkeys(attention)
    plans = [(role, role, full) for role in baseline_roles(eager)] if teacher else []
    default = default_mixer(LINEAR)
    names = (default,) if mixers is None else tuple(dict.fromkeys(map(_linear_mixer, mixers)))
    for count in counts:
        kept = place_attention(PLACEMENT, count, layers)
        title = "linear" if count == 0 else f"hybrid-{count}"
        for mixer in names[:1] if count == layers else names:
            suffix = "" if mixer == default or count == layers else f" {mixer}"
            plans.append((f"{title}{suffix}", STUDENT, _with_attention(full, kept, mixer)))
    return [
        make_subject(
            title,
            role,
            config,
            partial(store.random, config, name, seed),
            "random",
            eager=eager,
        )
        for title, role, config in plans
    ]


def _linear_mixer(name: str) -> str:
    """`name` of a mixer of linear layers. Raises `DataError`."""
    known = [one for one, spec in mixer_specs().items() if spec.layer_type == LINEAR]
    if name not in known:
        raise DataError(
            f"no mixer of linear layers is called {name}: give {join_or(known)}"
            f"{suggest(name, known)}"
        )
    return name


def _with_attention(full: HolisticVLMConfig, kept: Sequence[int], mixer: str) -> HolisticVLMConfig:
    """`full` with `mixer` in all layers but `kept`."""
    mixers = [name if layer in kept else mixer for layer, name in enumerate(full.mixer_names)]
    kinds = [mixer_spec(name).layer_type for name in mixers]
    return HolisticVLMConfig.from_dict({**full.to_dict(), "layer_types": kinds, "mixers": mixers})
