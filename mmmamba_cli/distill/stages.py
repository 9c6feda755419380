"""A stage as a value: from the recipe's words to the loss they name."""

from __future__ import annotations

from collections.abc import Sequence

from mmmamba_cli.distill.hidden_alignment import HiddenAlignment
from mmmamba_cli.distill.layerwise import LayerLoss, Layerwise
from mmmamba_cli.distill.logits_kl import LogitsKL
from mmmamba_cli.distill.matrix_orientation import MatrixOrientation
from mmmamba_cli.distill.mixer_mse import MixerMSE
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.model import LINEAR, HolisticVLMConfig
from mmmamba_cli.recipe import KL, Stage

LAYER_LOSSES: dict[str, LayerLoss] = {
    "mixer-mse": MixerMSE(),
    "matrix-orientation": MatrixOrientation(),
    "hidden-alignment": HiddenAlignment(),
}


def objective_of(stage: Stage, config: HolisticVLMConfig, learning: Sequence[str]) -> Objective:
    """The loss of a stage for a student with that config, of which `learning` learns.

    Layer losses are taken in linear layers where something learns. Raises `RecipeError` if there is
    none, or if the loss does not depend on a parameter that learns: weight decay alone would change
    that.
    """
    if stage.loss == "kl":
        return LogitsKL(stage.kl or KL(), stage.loss_scale)
    owners = {int(n.split(".")[2]) for n in learning if n.startswith("model.layers.")}
    linear = {i for i, kind in enumerate(config.layer_types) if kind == LINEAR}
    layers = tuple(sorted(owners & linear))
    if not layers:
        raise RecipeError(
            f"stages.{stage.name}.learns: no linear layer learns, and loss {stage.loss} is one of "
            "linear layers",
            "name parameters of their mixers, or take loss: kl",
        )
    objective = Layerwise(LAYER_LOSSES[stage.loss], layers, stage.inputs, stage.loss_scale)
    unreached = [name for name in learning if not objective.reaches(name)]
    if unreached:
        others = f" and {len(unreached) - 1} more" if len(unreached) > 1 else ""
        raise RecipeError(
            f"stages.{stage.name}.learns: loss {stage.loss} does not depend on "
            f"{unreached[0]}{others}; weight decay alone would change them",
            _reachable(stage, objective, learning, config),
        )
    return objective


def _reachable(
    stage: Stage, objective: Layerwise, learning: Sequence[str], config: HolisticVLMConfig
) -> str:
    """The setting that lets only those learn which the loss depends on."""
    reached = [name for name in learning if objective.reaches(name)]
    # Patterns over all layers would name attention's projections as well.
    if len(objective.layers) == len(config.layer_types):
        reached = [f"*.{'.'.join(name.split('.')[3:])}" for name in reached]
    return f"--set 'stages.{stage.name}.learns=[{', '.join(sorted(set(reached)))}]'"
