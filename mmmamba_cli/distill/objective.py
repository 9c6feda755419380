"""The interface of a stage's loss, and the loss that each stage of a recipe names.

A loss is a weighted sum over terms (layers, or a divergence and a cross-entropy), and a term is a
sum over units (tokens, elements or samples) of the global batch. Term weights are computed from the
units of the whole global batch, so that the loss is a mean over all units, not a mean of means,
whatever the split into micro batches and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from torch import Tensor

from mmmamba_cli.architecture import mixer_spec, parameter_shapes
from mmmamba_cli.data import Batch
from mmmamba_cli.distill.kl_loss import LogitsKL
from mmmamba_cli.distill.layer_losses import (
    HiddenAlignment,
    LayerLoss,
    LayerwiseLoss,
    MatrixOrientation,
    MixerMSE,
)
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.model import LINEAR, HolisticVLMConfig
from mmmamba_cli.recipe import KL, Stage

LAYER_LOSSES: dict[str, LayerLoss] = {
    "mixer-mse": MixerMSE(),
    "matrix-orientation": MatrixOrientation(),
    "hidden-alignment": HiddenAlignment(),
}


class Objective(Protocol):
    """A loss over micro batches."""

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

    def count_units(self, pair: TeacherStudent, batch: Batch) -> Tensor:
        """Count the units of each term in a micro batch: (terms,) float64 on the CPU.

        The batch may be on the CPU.
        """
        ...

    def term_weights(self, units: Tensor) -> Tensor:
        """Weight of each term, (terms,), given the units of the global batch."""
        ...

    def loss_sums(self, pair: TeacherStudent, batch: Batch, weights: Tensor | None) -> Tensor:
        """Sum each term over a micro batch: (terms,) float64 on the CPU.

        With `weights`, run the backward pass of the weighted sum too, adding to the gradients.
        """
        ...


def build_objective(stage: Stage, config: HolisticVLMConfig, trainable: Sequence[str]) -> Objective:
    """Build the loss of a stage for a student of `config` with the parameters `trainable`.

    Layer losses apply to linear layers that have a trainable parameter.

    Raises:
        RecipeError: no linear layer has a trainable parameter, or the loss does not depend on a
            trainable parameter, which weight decay alone would change.
    """
    if stage.loss == "kl":
        return LogitsKL(stage.kl or KL(), stage.loss_scale)
    owners = {int(n.split(".")[2]) for n in trainable if n.startswith("model.layers.")}
    linear = {i for i, kind in enumerate(config.layer_types) if kind == LINEAR}
    layers = tuple(sorted(owners & linear))
    if not layers:
        raise RecipeError(
            f"stages.{stage.name}.learns: no linear layer learns, and loss {stage.loss} is one of "
            "linear layers",
            "name parameters of their mixers, or take loss: kl",
        )
    mixers = tuple(mixer_spec(name) for name in config.mixer_names)
    objective = LayerwiseLoss(
        LAYER_LOSSES[stage.loss], layers, stage.inputs, stage.loss_scale, mixers
    )
    unreached = [name for name in trainable if not objective.depends_on(name)]
    if unreached:
        others = f" and {len(unreached) - 1} more" if len(unreached) > 1 else ""
        raise RecipeError(
            f"stages.{stage.name}.learns: loss {stage.loss} does not depend on "
            f"{unreached[0]}{others}; weight decay alone would change them",
            _suggest_learns(stage, objective, trainable, config),
        )
    return objective


def _suggest_learns(
    stage: Stage, objective: LayerwiseLoss, trainable: Sequence[str], config: HolisticVLMConfig
) -> str:
    """The `--set` option that restricts `learns` to the parameters the loss depends on."""
    reached = {name for name in trainable if objective.depends_on(name)}
    names = tuple(parameter_shapes(config))
    listed = set()
    for name in reached:
        # In a hybrid, a pattern over all layers would also match the projections of attention.
        pattern = f"*.{'.'.join(name.split('.')[3:])}"
        matched = {other for other in names if fnmatchcase(other, pattern)}
        listed.add(pattern if matched <= reached else name)
    return f"--set 'stages.{stage.name}.learns=[{', '.join(sorted(listed))}]'"
