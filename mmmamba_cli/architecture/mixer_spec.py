"""The description of a mixer as plain values, and the registry of all mixers.

`architecture/mixers/NAME.py` registers the `MixerSpec` of a mixer; its module is
`model/mixers/NAME.py`, and its step over packed weights `inference/mixers/NAME.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from mmmamba_cli.architecture.sizes import CacheBytes, MixerConfig, StackConfig

# Kept in fp32 in every layer, whatever its mixer; a name matches a part of a parameter's name.
SHARED_FP32_PARAMETERS = frozenset({"mixer_norm", "mlp_norm", "q_norm", "k_norm", "norm"})

# Values of `MixerSpec.decay`.
EXACT_DECAY, DECAY_BOUND = "exact", "bound"


@dataclass(frozen=True)
class MixerSpec:
    """A mixer as plain values.

    Attributes:
        name: name in `config.mixers` and in recipes.
        title: name in tables and messages.
        layer_type: transformers' word for its layers, from which caches are built:
            "full_attention" for a cache that grows with the text, else "linear_attention".
        parameter_shapes: from the stack, the options and D: names and shapes of the mixer's
            parameters in `state_dict` order.
        cache_bytes: from the stack, the options, the batch size, the columns and the bytes of an
            element: bytes of the layer's decoding cache.
        operations: from the stack, the options, the columns computed and the context: multiply-add
            pairs per row of the batch between the projections.
        options: fields of `MixerConfig` that the mixer reads.
        matrix_parameters: parameters, or prefixes of their names, that the mixing matrix depends
            on, and those of which it depends on some elements only.
        fp32_parameters: parameters of the mixer that stay fp32 in a model of a narrower dtype.
        decay_parameters: parameters of the decay outside of projections; `trainable: paper` freezes
            them in KL stages.
        is_default: whether it is the mixer of its layer type where a config names none.
        is_packed: from the options: whether `inference.mixers` has its step over packed weights.
        is_calibrated: from the options: whether seeding can calibrate it. Its module then is a
            `GatedMixer` with `constant_decay`.
        decay: what the decay gamma says of a deviation of the state, given the inputs: EXACT_DECAY
            if a token multiplies it by gamma, DECAY_BOUND if a token shrinks it at least by gamma.
            Its module then is a `GatedMixer`. None for a mixer whose state does not decay.
        forgetting: from the options: how a mixer without a decay forgets, as a predicate.
    """

    name: str
    title: str
    layer_type: str
    parameter_shapes: Callable[[StackConfig, MixerConfig, int], dict[str, tuple[int, ...]]]
    cache_bytes: Callable[[StackConfig, MixerConfig, int, int, int], CacheBytes]
    operations: Callable[[StackConfig, MixerConfig, int, int], int]
    options: tuple[str, ...]
    matrix_parameters: tuple[str, ...]
    partial_matrix_parameters: tuple[str, ...] = ()
    fp32_parameters: frozenset[str] = frozenset()
    decay_parameters: frozenset[str] = frozenset()
    is_default: bool = False
    is_packed: Callable[[MixerConfig], bool] = lambda options: False
    is_calibrated: Callable[[MixerConfig], bool] = lambda options: False
    decay: str | None = None
    forgetting: Callable[[MixerConfig], str] = lambda options: "does not decay"

    def slow_title(self, options: MixerConfig) -> str | None:
        """The title and the options in the way of fast decoding, if any; None if it is fast."""
        if self.is_packed(options):
            return None
        default = MixerConfig()
        hindrances = [
            f"mixer.{name} {getattr(options, name)}"
            for name in self.options
            if self.is_packed(replace(options, **{name: getattr(default, name)}))
        ]
        return " with ".join((self.title, *hindrances))


_SPECS: dict[str, MixerSpec] = {}


def register_spec(spec: MixerSpec) -> MixerSpec:
    """Add a mixer to the registry."""
    _SPECS[spec.name] = spec
    return spec


def mixer_specs() -> Mapping[str, MixerSpec]:
    """All mixers by name, in alphabetical order."""
    _import_mixers()
    return dict(sorted(_SPECS.items()))


def mixer_spec(name: str) -> MixerSpec:
    """The mixer `name`; `KeyError` if there is none."""
    if name not in _SPECS:
        _import_mixers()
    return _SPECS[name]


@cache
def _import_mixers() -> None:
    """Import the modules of `architecture.mixers`, which register themselves."""
    package = f"{__package__}.mixers"
    # Exported code has all mixers in one file, and no such package.
    if not __package__ or importlib.util.find_spec(package) is None:
        return
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


def join_and(names: Iterable[str]) -> str:
    """`a`, `a and b` or `a, b and c`; the empty string for no names."""
    *others, last = tuple(names) or ("",)
    return f"{', '.join(others)} and {last}" if others else last


def default_mixer(layer_type: str) -> str:
    """The name of the mixer of a layer type where a config names none."""
    return next(
        spec.name
        for spec in mixer_specs().values()
        if spec.is_default and spec.layer_type == layer_type
    )
