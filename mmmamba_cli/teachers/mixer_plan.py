"""The plan of a student: the mixer of each text layer, and the mixers' options. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmmamba_cli.architecture import (
    LINEAR,
    MixerConfig,
    default_mixer,
    mixer_spec,
    mixer_specs,
    mixers_problem,
    options_problem,
)
from mmmamba_cli.errors import MmmambaError

# The field of a student's config.json that holds the plan, and the prefix of its model_type.
PLAN_FIELD = "mmmamba"
MODEL_TYPE_PREFIX = "mmmamba_"
ATTENTION_MIXER = "attention"


def teacher_type(model_type: str) -> str:
    """The model_type of the teacher, of a student's or the teacher's own."""
    return model_type.removeprefix(MODEL_TYPE_PREFIX)


@dataclass(frozen=True)
class StudentPlan:
    """Which layers of the text decoder keep the teacher's attention, and what the others compute.

    Attributes:
        mixers: name of each layer's mixer; "attention" keeps the teacher's own module.
        options: options of the mixers, those of a HoVLE student (`MixerConfig`).

    Raises:
        MmmambaError: an unknown mixer, or options that are invalid or that no layer reads.
    """

    mixers: tuple[str, ...]
    options: MixerConfig = field(default_factory=MixerConfig)

    def __post_init__(self) -> None:
        known = mixer_specs()
        kinds = [known[name].layer_type if name in known else LINEAR for name in self.mixers]
        problem = options_problem(self.options) or mixers_problem(kinds, self.mixers, self.options)
        if problem is None and self.options.tile_taps:
            problem = "mixer.tile_taps is True, but the tiles of this teacher are not known"
        if problem is not None:
            raise MmmambaError(f"the plan of the student is invalid: {problem}")

    @classmethod
    def of_layers(
        cls,
        num_layers: int,
        linear: Iterable[int] | None = None,
        mixer: str | None = None,
        options: MixerConfig | None = None,
    ) -> StudentPlan:
        """A plan with a mixer in the layers `linear` (None: all) and attention in the others.

        `mixer` None is the default of recurrent layers.

        Raises:
            MmmambaError: a layer that does not exist, or an invalid plan.
        """
        chosen = set(range(num_layers) if linear is None else linear)
        outside = sorted(layer for layer in chosen if not 0 <= layer < num_layers)
        if outside:
            raise MmmambaError(
                f"layer {outside[0]} does not exist: the text decoder has {num_layers} layers",
                f"choose layers from 0 to {num_layers - 1}",
            )
        mixer = default_mixer(LINEAR) if mixer is None else mixer
        names = tuple(mixer if layer in chosen else ATTENTION_MIXER for layer in range(num_layers))
        return cls(names, options or MixerConfig())

    @classmethod
    def from_json(cls, section: Mapping[str, Any]) -> StudentPlan:
        """The plan of a config's section `mmmamba`.

        Raises:
            MmmambaError: fields that are missing or not known.
        """
        unknown = sorted(set(section) - {"mixers", "mixer"})
        options = section.get("mixer", {})
        unknown += [
            f"mixer.{one}" for one in options if one not in MixerConfig.__dataclass_fields__
        ]
        if unknown or "mixers" not in section:
            problem = f"has the unknown field {unknown[0]}" if unknown else "has no field mixers"
            raise MmmambaError(
                f"the section {PLAN_FIELD} of config.json {problem}",
                "a newer release of mmmamba may have written it: update mmmamba",
            )
        return cls(tuple(section["mixers"]), MixerConfig(**options))

    def to_json(self) -> dict[str, Any]:
        """The section `mmmamba` of a config."""
        return {"mixers": list(self.mixers), "mixer": self.options.stored()}

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Layers whose attention is replaced."""
        return tuple(i for i, name in enumerate(self.mixers) if name != ATTENTION_MIXER)

    @property
    def fp32_parameters(self) -> frozenset[str]:
        """Parts of names of the new parameters that stay fp32 in a model of a narrower dtype."""
        used = {name for name in self.mixers if name != ATTENTION_MIXER}
        return frozenset().union(*(mixer_spec(name).fp32_parameters for name in used))
