"""Initial values of Mamba-2 parameters that attention lacks, as pure functions.

Legend: D hidden size, H query heads, P head dim, W conv width.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from mmmamba_cli.errors import MmmambaError

INITS = ("scratch", "inherit", "inherit+mimic")
DT_MIN, DT_MAX = 1e-3, 1e-1
GATE_GAIN = 2**-2.5
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
BIASES = tuple(f"{name}.bias" for name in PROJECTIONS)
QK_NORMS = ("q_norm.weight", "k_norm.weight")
# Parameters that attention has too; biases and norms only if the teacher has them.
INHERITED_PARAMETERS = (*(f"{name}.weight" for name in PROJECTIONS), *BIASES, *QK_NORMS)


def initial_value(name: str, shape: tuple[int, ...], init: str, seed: int) -> Tensor:
    """The initial value, fp32, of mixer parameter `name` (its full name in the model).

    "inherit+mimic" is the paper's (arXiv 2502.13145, section 3.2): new parameters imitate attention
    as closely as possible. "inherit" uses Mamba-2's default (arXiv 2405.21060) for new parameters,
    "scratch" for the projections too. Random numbers depend only on `seed` and the name.
    """
    if init not in INITS:
        raise MmmambaError(f"--init {init!r} is not known, known are: {', '.join(INITS)}")
    part = name.split(".mixer.")[1]
    rng = _generator(name, seed)
    if part == "dt_bias":
        return dt_bias(shape, rng)
    if part in ("g_norm.weight", *QK_NORMS):
        return torch.ones(shape)
    if part in BIASES:
        return torch.zeros(shape)
    if part in INHERITED_PARAMETERS:
        return _linear(shape, rng)
    return (
        _attention_like(part, shape, rng)
        if init == "inherit+mimic"
        else _mamba2_default(part, shape, rng)
    )


def dt_bias(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """(H,) softplus^-1 of exp(U[log 1e-3, log 1e-1]), clamped at 1e-3."""
    span = math.log(DT_MAX) - math.log(DT_MIN)
    dt = torch.exp(torch.rand(shape, generator=rng) * span + math.log(DT_MIN)).clamp(min=DT_MIN)
    return dt + torch.log(-torch.expm1(-dt))


def _attention_like(part: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    if part == "A_log":
        return torch.ones(shape)
    if part == "g_proj.weight":
        bound = GATE_GAIN * math.sqrt(6 / (shape[0] + shape[1]))
        return _uniform(shape, bound, rng)
    value = torch.zeros(shape)
    if part == "conv1d.weight":
        value[..., -1] = 1
    return value


def _mamba2_default(part: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    if part == "A_log":
        return torch.log(torch.rand(shape, generator=rng) * 15 + 1)
    if part == "D":
        return torch.ones(shape)
    if part == "conv1d.bias":
        return torch.zeros(shape)
    if part == "conv1d.weight":
        return _uniform(shape, 1 / math.sqrt(shape[-1]), rng)
    return _linear(shape, rng)


def _linear(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """PyTorch's default of a linear layer: U[-1/sqrt(fan_in), 1/sqrt(fan_in)]."""
    return _uniform(shape, 1 / math.sqrt(shape[-1]), rng)


def _uniform(shape: tuple[int, ...], bound: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=rng) * 2 - 1) * bound


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
