"""FSDP2 (`torch.distributed.fsdp.fully_shard`) applied to the mixers of a built model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from mmmamba_cli.distributed.world import World


def shard_mixers(
    mixers: Iterable[nn.Module], world: World, forward_methods: Collection[str] = ()
) -> list[FSDPModule]:
    """Shard the trainable parameters of each mixer, with their gradients and optimiser states.

    Frozen parameters are replicated: teacher and student share them, and gathering them for every
    layer would cost more than the 2 bytes per parameter saved (a trainable one takes 16).
    `forward_methods` are methods that the loss calls instead of `forward`, for example "mix" for
    the output before W_O; W_O, which they do not use, is then replicated too. Does nothing for a
    single process.

    Returns the sharded mixers. FSDP averages gradients over processes: multiply the loss by
    `world.size` to get the sum.
    """
    sharded: list[FSDPModule] = []
    if world.mesh is None:
        return sharded
    # A mixer returns a view of its heads, and nothing changes it in place afterwards.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for mixer in mixers:
        frozen = {p for p in mixer.parameters() if not p.requires_grad}
        if len(frozen) == len(list(mixer.parameters())):
            continue
        unused = set(mixer.get_submodule("o_proj").parameters()) if forward_methods else set()
        sharded.append(fully_shard(mixer, mesh=world.mesh, ignored_params=frozen | unused))
        for method in forward_methods:
            register_fsdp_forward_method(mixer, method)
    return sharded


def is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)
