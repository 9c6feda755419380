"""AdamW over fp32 master weights, learning-rate schedules, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmmamba_cli.distill.trainable import has_weight_decay
from mmmamba_cli.distributed import is_sharded
from mmmamba_cli.recipe import Schedule, Stage


def build_optimiser(
    stage: Stage,
    parameters: Mapping[str, nn.Parameter],
    no_decay: Collection[str] = (),
    *,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter, arXiv 1711.05101) with zero moments.

    Weight decay applies to parameters for which `has_weight_decay` is true and that are neither
    vectors, such as a family's norms, nor in `no_decay`. Moments exist before the first step, so
    that a saved state can be read into them. With `fused`, a step is a few kernels over
    all parameters; None takes it on GPUs only. Fused and plain steps agree up to rounding, and have
    the same state.
    """
    settings = stage.optimiser
    decaying = {
        name
        for name, p in parameters.items()
        if p.ndim > 1 and has_weight_decay(name) and name not in no_decay
    }
    groups = [
        {
            "params": [
                p
                for name, p in parameters.items()
                if (name in decaying) == decayed and is_sharded(p) == sharded
            ],
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        # One kernel takes no list of sharded and unsharded tensors.
        for decayed in (True, False)
        for sharded in (False, True)
    ]
    if fused is None:
        fused = all(parameter.device.type == "cuda" for parameter in parameters.values())
    optimiser = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=stage.lr,
        betas=settings.betas,
        eps=settings.eps,
        # False would exclude torch's other choices.
        fused=fused or None,
    )
    for parameter in parameters.values():
        optimiser.state[parameter] = {
            # A fused step counts on the device, so that it needs no synchronization.
            "step": torch.zeros((), device=parameter.device if fused else None),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimiser


def learning_rate(stage: Stage, step: int) -> float:
    """The learning rate of step `step`, counted from 0.

    Warm-up is linear and reaches the peak at its last step. After it, `constant` stays at the peak,
    `wsd` stays and then falls linearly, and `cosine` falls over all steps. Both would reach
    `schedule.final` one step after the last, so that no step has a rate of 0.
    """
    return stage.lr * lr_factor(stage.schedule, step, stage.steps)


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate at `step` of `steps`, divided by the peak."""
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


def clip_gradients(parameters: Mapping[str, nn.Parameter], limit: float | None) -> Tensor:
    """Clip the global gradient norm to `limit`; return the norm before clipping, 0-d.

    The norm stays on the device of the gradients: nothing waits for a GPU.
    """
    learning = [p for p in parameters.values() if p.grad is not None]
    # torch does not mix sharded and unsharded tensors in one norm.
    kinds = [[p for p in learning if is_sharded(p) == sharded] for sharded in (True, False)]
    norms = [
        full_tensor(torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]))
        for kind in kinds
        if kind
    ]
    if not norms:
        return torch.zeros(())
    norm = torch.stack(norms).norm()
    if limit is not None:
        # torch clips norms a little below the limit too; a norm of 0 multiplies by 1.
        clipped = torch.where(norm.double() > limit, norm, torch.zeros_like(norm))
        for kind in kinds:
            torch.nn.utils.clip_grads_with_norm_(kind, limit, clipped)
    return norm


def largest_magnitudes(parameters: Mapping[str, nn.Parameter]) -> tuple[tuple[str, ...], Tensor]:
    """Names of the parameters with a gradient, and the largest magnitude of each, (n,).

    A magnitude is finite if all elements are. Of sharded gradients this process sees its share
    only. The result stays on the device of the gradients.
    """
    found = {name: local_tensor(p.grad) for name, p in parameters.items() if p.grad is not None}
    # A share of a sharded parameter may be empty.
    found = {name: gradient for name, gradient in found.items() if gradient.numel()}
    if not found:
        return (), torch.zeros(0)
    # A few kernels for all tensors, as in torch's own `get_total_norm`.
    return tuple(found), torch.stack(torch._foreach_norm(list(found.values()), math.inf))


def step_if(optimiser: torch.optim.AdamW, condition: Tensor) -> None:
    """Take an optimiser step if the 0-d bool `condition` is true, else change nothing.

    A fused step reads the condition on the device, as it does for `torch.amp.GradScaler`, and its
    bits are those of an unconditional step. A plain step waits for the value.
    """
    if not optimiser.defaults["fused"]:
        if bool(condition):
            optimiser.step()
        return
    optimiser.found_inf = condition.logical_not().float()  # type: ignore[attr-defined]
    try:
        optimiser.step()
    finally:
        del optimiser.found_inf  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """The share of this process of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
