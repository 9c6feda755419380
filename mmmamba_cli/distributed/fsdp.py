"""FSDP2 as a pass over a built model (torch.distributed.fsdp.fully_shard)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from mmmamba_cli.distributed.world import World


def shard_mixers(mixers: Iterable[nn.Module], world: World, entries: Collection[str] = ()) -> None:
    """Shard the learning parameters of each mixer, their gradients and optimiser states.

    What is frozen stays whole on every process: teacher and student share it, and gathering it
    anew for every layer would cost more than it takes (2 bytes a parameter, against 16 for one that
    learns). `entries` are methods that the loss calls in the place of `forward`, as "mix" for the
    output before W_O; W_O, which they do not reach, then stays whole too. A world of one is left as
    it is. Gradients are averaged over processes by FSDP, and those of what is whole by
    `average_unsharded_gradients`, so whoever wants a sum multiplies the loss by `world.size`.
    """
    if world.mesh is None:
        return
    for mixer in mixers:
        frozen = {p for p in mixer.parameters() if not p.requires_grad}
        if len(frozen) == len(list(mixer.parameters())):
            continue
        beyond = set(mixer.get_submodule("o_proj").parameters()) if entries else set()
        fully_shard(mixer, mesh=world.mesh, ignored_params=frozen | beyond)
        for entry in entries:
            register_fsdp_forward_method(mixer, entry)


def average_unsharded_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Average over processes the gradients of learning parameters that are not sharded.

    A parameter without a gradient on any process stays without one, so that the optimiser leaves
    it alone, as it does on a single process.
    """
    if world.size == 1:
        return
    whole = [parameter for parameter in parameters if not is_sharded(parameter)]
    counts = world.all_reduce_sum(torch.tensor([float(p.grad is not None) for p in whole]))
    for parameter, count in zip(whole, counts.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world.size


def is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)
