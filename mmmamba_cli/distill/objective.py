"""The interface of a stage's loss, and the loss that each stage of a recipe names.

A loss is a weighted sum over terms (layers, or a divergence and a cross-entropy), and a term is a
sum over units (tokens, elements or samples) of the global batch. Term weights are computed from the
units of the whole global batch, so that the loss is a mean over all units, not a mean of means,
whatever the split into micro batches and processes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import Tensor

from mmmamba_cli.architecture import mixer_spec, parameter_shapes
from mmmamba_cli.distill.in_place_losses import (
    HookedHiddenAlignment,
    HookedLayerLoss,
    HookedLoss,
    HookedMatrixOrientation,
    HookedMixerMSE,
)
from mmmamba_cli.distill.kl_loss import LogitsKL
from mmmamba_cli.distill.layer_losses import (
    HiddenAlignment,
    LayerLoss,
    LayerwiseLoss,
    MatrixOrientation,
    MixerMSE,
)
from mmmamba_cli.distill.student_layers import StudentLayers, holistic_layers
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.recipe import KL, Stage

LAYER_LOSSES: dict[str, LayerLoss] = {
    "mixer-mse": MixerMSE(),
    "matrix-orientation": MatrixOrientation(),
    "hidden-alignment": HiddenAlignment(),
}
HOOKED_LOSSES: dict[str, HookedLoss] = {
    "mixer-mse": HookedMixerMSE(),
    "matrix-orientation": HookedMatrixOrientation(),
    "hidden-alignment": HookedHiddenAlignment(),
}


class Objective(Protocol):
    """A loss over micro batches of one kind of models, with their pair and batches."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms in logs."""
        ...

    @property
    def layer_local(self) -> bool:
        """Whether layers run one by one, and mixers are called by `mix` instead of `forward`."""
        ...

    def depends_on(self, name: str) -> bool:
        """Whether the loss depends on the student's parameter `name`."""
        ...

    def depends_on_part_of(self, name: str) -> bool:
        """Whether the loss depends on some elements of the parameter only.

        Such a parameter gets no weight decay, which alone would shrink the other elements.
        """
        ...

    def count_units(self, pair: Any, batch: Any) -> Tensor:
        """Count the units of each term in a micro batch: (terms,) float64 on the CPU.

        The batch may be on the CPU.
        """
        ...

    def term_weights(self, units: Tensor) -> Tensor:
        """Weight of each term, (terms,), given the units of the global batch."""
        ...

    def loss_sums(self, pair: Any, batch: Any, weights: Tensor | None) -> Tensor:
        """Sum each term over a micro batch: (terms,) float64 on the pair's device.

        With `weights`, run the backward pass of the weighted sum too, adding to the gradients.
        """
        ...


def build_objective(stage: Stage, config: HolisticVLMConfig, trainable: Sequence[str]) -> Objective:
    """Build the loss of a stage for a student of `config` with the parameters `trainable`.

    Layer losses apply to linear layers that have a trainable parameter.

    Raises:
        RecipeError: no linear layer has a trainable parameter, or the loss does not depend on a
            trainable parameter, which weight decay alone would change; or pictures are weighted in
            a model without them.
    """
    if stage.loss == "kl":
        return LogitsKL(stage.kl or KL(), stage.loss_scale)
    student = holistic_layers(config)
    mixers = tuple(mixer_spec(name) for name in config.mixer_names)
    objective = LayerwiseLoss(
        LAYER_LOSSES[stage.loss],
        _layers_that_learn(stage, student, trainable),
        stage.inputs,
        stage.loss_scale,
        mixers,
        _weights_pictures(stage, config.vision_config is not None),
    )
    _check_reached(stage, objective, trainable, student, tuple(parameter_shapes(config)))
    return objective


def build_in_place_objective(
    stage: Stage,
    student: StudentLayers,
    names: Collection[str],
    trainable: Sequence[str],
    *,
    has_vision: bool = True,
) -> Objective:
    """`build_objective` for a student of a transformers model with the parameters `names`.

    `has_vision` tells whether the model reads pictures.
    """
    if stage.loss == "kl":
        return LogitsKL(stage.kl or KL(), stage.loss_scale)
    objective = HookedLayerLoss(
        HOOKED_LOSSES[stage.loss],
        _layers_that_learn(stage, student, trainable),
        stage.inputs,
        stage.loss_scale,
        student,
        _weights_pictures(stage, has_vision),
    )
    _check_reached(stage, objective, trainable, student, names)
    return objective


def _weights_pictures(stage: Stage, has_vision: bool) -> bool:
    """Whether a stage weights pictures by density. Raises `RecipeError` for a text model."""
    if stage.loss_weights == "density" and not has_vision:
        raise RecipeError(
            f"stages.{stage.name}.loss_weights: is density, which weights the tokens of pictures, "
            "and the student reads text only",
            f"give --set stages.{stage.name}.loss_weights=none",
        )
    return stage.loss_weights == "density"


def _layers_that_learn(
    stage: Stage, student: StudentLayers, trainable: Sequence[str]
) -> tuple[int, ...]:
    """Linear layers with a trainable parameter. Raises `RecipeError` if there is none."""
    owners = {student.layer_part(name)[0] for name in trainable}
    layers = tuple(layer for layer in student.linear if layer in owners)
    if not layers:
        raise RecipeError(
            f"stages.{stage.name}.learns: no linear layer learns, and loss {stage.loss} is one of "
            "linear layers",
            "name parameters of their mixers, or take loss: kl",
        )
    return layers


def _check_reached(
    stage: Stage,
    objective: Objective,
    trainable: Sequence[str],
    student: StudentLayers,
    names: Collection[str],
) -> None:
    """Raise `RecipeError` if the loss does not depend on a trainable parameter."""
    unreached = [name for name in trainable if not objective.depends_on(name)]
    if unreached:
        others = f" and {len(unreached) - 1} more" if len(unreached) > 1 else ""
        raise RecipeError(
            f"stages.{stage.name}.learns: loss {stage.loss} does not depend on "
            f"{unreached[0]}{others}; weight decay alone would change them",
            _suggest_learns(stage, objective, trainable, student, names),
        )


def _suggest_learns(
    stage: Stage,
    objective: Objective,
    trainable: Sequence[str],
    student: StudentLayers,
    names: Collection[str],
) -> str:
    """The `--set` option that restricts `learns` to the parameters the loss depends on."""
    reached = {name for name in trainable if objective.depends_on(name)}
    listed = set()
    for name in reached:
        # In a hybrid, a pattern over all layers would also match the projections of attention.
        pattern = f"*.{student.layer_part(name)[1]}"
        matched = {other for other in names if fnmatchcase(other, pattern)}
        listed.add(pattern if matched <= reached else name)
    return f"--set 'stages.{stage.name}.learns=[{', '.join(sorted(listed))}]'"
