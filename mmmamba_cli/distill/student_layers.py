"""Where a student's mixers are among its parameters, for all kinds of students."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mmmamba_cli.architecture import ATTENTION, LINEAR, default_mixer, mixer_spec
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.teachers import StudentPlan


@dataclass(frozen=True)
class StudentLayers:
    """The layers of a student's decoder in the names of its parameters.

    Attributes:
        path: name of the list of layers, such as `model.layers`.
        part: name of the mixer in a layer.
        mixers: the mixer of each layer.
        inherited: for each layer, names in the mixer of the parameters that attention has too.
    """

    path: str
    part: str
    mixers: tuple[str, ...]
    inherited: tuple[frozenset[str], ...]

    @property
    def linear(self) -> tuple[int, ...]:
        """Layers whose mixer is not attention."""
        kinds = (mixer_spec(name).layer_type for name in self.mixers)
        return tuple(layer for layer, kind in enumerate(kinds) if kind == LINEAR)

    def prefix(self, layer: int) -> str:
        """What the names of a mixer's parameters begin with."""
        return f"{self.path}.{layer}.{self.part}."

    def layer_part(self, name: str) -> tuple[int | None, str]:
        """The layer of a parameter and its name in the layer; None for other parameters."""
        if not name.startswith(f"{self.path}."):
            return None, name
        number, _, inner = name.removeprefix(f"{self.path}.").partition(".")
        return int(number), inner

    def mixer_part(self, name: str) -> tuple[int | None, str]:
        """The layer of a mixer's parameter and its name in the mixer; None for others."""
        layer, inner = self.layer_part(name)
        if layer is None or not inner.startswith(f"{self.part}."):
            return None, name
        return layer, inner.removeprefix(f"{self.part}.")


def holistic_layers(config: HolisticVLMConfig) -> StudentLayers:
    """The layers of a `HolisticVLM`, counted through both stacks."""
    attention = mixer_spec(default_mixer(ATTENTION)).parameter_shapes
    return StudentLayers(
        path="model.layers",
        part="mixer",
        mixers=tuple(config.mixer_names),
        inherited=tuple(
            frozenset(attention(config.stack_of(i), config.mixer_config, config.hidden_size))
            for i in range(len(config.mixer_names))
        ),
    )


def in_place_layers(
    path: str, part: str, plan: StudentPlan, names: Collection[str], new: Collection[str]
) -> StudentLayers:
    """The text layers of a student of a transformers model.

    `path` and `part` are those of the teacher's anatomy, `names` those of all parameters, and `new`
    of those that the teacher lacks.
    """
    inherited: list[set[str]] = [set() for _ in plan.mixers]
    layers = StudentLayers(path, part, plan.mixers, ())
    for name in names:
        layer, inner = layers.mixer_part(name)
        if layer is not None and name not in new:
            inherited[layer].add(inner)
    return StudentLayers(path, part, plan.mixers, tuple(map(frozenset, inherited)))
