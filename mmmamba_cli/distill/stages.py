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

    Layer losses are taken where something learns: layers that are attention have nothing to.
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
    return Layerwise(LAYER_LOSSES[stage.loss], layers, stage.inputs, stage.loss_scale)
