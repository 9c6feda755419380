"""FSDP2 (`torch.distributed.fsdp.fully_shard`) applied to the mixers of a built model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from mmmamba_cli.distributed.world import World


def shard_mixers(
    mixers: Iterable[nn.Module], world: World, forward_methods: Collection[str] = ()
) -> None:
    """Shard the trainable parameters of each mixer, with their gradients and optimiser states.

    Frozen parameters are replicated: teacher and student share them, and gathering them for every
    layer would cost more than the 2 bytes per parameter saved (a trainable one takes 16).
    `forward_methods` are methods that the loss calls instead of `forward`, for example "mix" for
    the output before W_O; W_O, which they do not use, is then replicated too. Does nothing for a
    single process.

    FSDP averages gradients over processes, and `average_unsharded_gradients` does so for replicated
    parameters: multiply the loss by `world.size` to get the sum.
    """
    if world.mesh is None:
        return
    # A mixer returns a view of its heads, and nothing changes it in place afterwards.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for mixer in mixers:
        frozen = {p for p in mixer.parameters() if not p.requires_grad}
        if len(frozen) == len(list(mixer.parameters())):
            continue
        unused = set(mixer.get_submodule("o_proj").parameters()) if forward_methods else set()
        fully_shard(mixer, mesh=world.mesh, ignored_params=frozen | unused)
        for method in forward_methods:
            register_fsdp_forward_method(mixer, method)


def average_unsharded_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Average the gradients of parameters that are not sharded over processes.

    A parameter without a gradient on every process keeps none, so that the optimiser skips it as on
    a single process.
    """
    if world.size == 1:
        return
    replicated = [parameter for parameter in parameters if not is_sharded(parameter)]
    counts = world.all_reduce_sum(torch.tensor([float(p.grad is not None) for p in replicated]))
    for parameter, count in zip(replicated, counts.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world.size


def is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)
