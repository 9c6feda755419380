"""Initial values of the mixer parameters of a student, as a pure function of name and seed."""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.model.gated_mixer import linear_default
from mmmamba_cli.model.mixer import mixer_class, parameter_generator

INITS = ("scratch", "inherit", "inherit+mimic", "calibrated")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
BIASES = tuple(f"{name}.bias" for name in PROJECTIONS)
QK_NORMS = ("q_norm.weight", "k_norm.weight")
# Parameters that attention has too; biases and norms only if the teacher has them.
INHERITED_PARAMETERS = (*(f"{name}.weight" for name in PROJECTIONS), *BIASES, *QK_NORMS)


def initial_value(name: str, shape: tuple[int, ...], mixer: str, init: str, seed: int) -> Tensor:
    """The initial value, fp32, of parameter `name` (its full name in the model) of a `mixer`.

    "inherit+mimic" is the paper's (arXiv 2502.13145, section 3.2): new parameters imitate attention
    as closely as possible. "calibrated" begins with the same values, of which `calibrate` replaces
    some. "inherit" uses the default of the mixer's own paper for new parameters, "scratch" for the
    projections too. Random numbers depend only on `seed` and the name.
    """
    if init not in INITS:
        raise MmmambaError(f"--init {init!r} is not known, known are: {', '.join(INITS)}")
    part = name.split(".mixer.")[1]
    rng = parameter_generator(name, seed)
    if part in QK_NORMS:
        return torch.ones(shape)
    if part in BIASES:
        return torch.zeros(shape)
    if part in INHERITED_PARAMETERS:
        return linear_default(shape, rng)
    mimic = init in ("inherit+mimic", "calibrated")
    value: Tensor = mixer_class(mixer).initial_value(part, shape, mimic, rng)
    return value
