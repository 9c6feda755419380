"""AdamW over fp32 master weights, and the learning rate over the steps of a stage."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmmamba_cli.distill.trainable import decays
from mmmamba_cli.distributed import is_sharded
from mmmamba_cli.recipe import Schedule, Stage


def build_optimiser(
    stage: Stage, parameters: Mapping[str, nn.Parameter], undecayed: Collection[str] = ()
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with decay where `decays` says so.

    The parameters named in `undecayed` are not decayed either.

    States exist from the start, so that a saved state can be read into them.
    """
    settings = stage.optimiser
    groups = [
        {
            "params": [
                p
                for name, p in parameters.items()
                if (decays(name) and name not in undecayed) == decayed
            ],
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    optimiser = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=stage.lr,
        betas=settings.betas,
        eps=settings.eps,
    )
    for parameter in parameters.values():
        optimiser.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimiser


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of step `step`, counted from 0: warm-up, then as the schedule's kind says.

    Warm-up is linear and reaches the peak at its last step; `wsd` is stable, then falls linearly;
    `cosine` falls all the way. Both would reach their final share one step after the last, so that
    no step is taken with a rate of 0.
    """
    return stage.lr * share_of_peak(stage.schedule, step, stage.steps)


def share_of_peak(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate at `step` of `steps`, as a share of its peak."""
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        done = (step - warmup) / (steps - warmup)
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * done)) / 2
    decay = round(schedule.decay * steps)
    left = (steps - step) / decay if decay else 1.0
    return schedule.final + (1 - schedule.final) * min(1.0, left)


def clip(parameters: Mapping[str, nn.Parameter], limit: float | None) -> float:
    """Scale the gradients down to norm `limit` if they exceed it; returns the norm they had."""
    learning = [p for p in parameters.values() if p.grad is not None]
    # torch takes no mixture of what is spread over processes and what is whole.
    kinds = [[p for p in learning if is_sharded(p) == sharded] for sharded in (True, False)]
    norms = [
        whole(torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]))
        for kind in kinds
        if kind
    ]
    if not norms:
        return 0.0
    norm = torch.stack(norms).norm()
    if limit is not None and bool(norm > limit):
        for kind in kinds:
            torch.nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return float(norm)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over processes, as one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
