"""FSDP2 as a pass over a built model (torch.distributed.fsdp.fully_shard)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mmmamba_cli.distributed.world import World


def shard_mixers(mixers: Iterable[nn.Module], world: World, entries: Collection[str] = ()) -> None:
    """Shard the learning parameters of each mixer, their gradients and optimiser states.

    What is frozen stays whole on every process: teacher and student share it, and gathering it
    anew for every layer would cost more than it takes (2 bytes a parameter, against 16 for one that
    learns). `entries` are methods that the loss calls in the place of `forward`, as "mix" for the
    output before W_O. A world of one is left as it is. Gradients are averaged over processes by
    FSDP, so whoever wants a sum multiplies the loss by `world.size`.
    """
    if world.mesh is None:
        return
    for mixer in mixers:
        frozen = {p for p in mixer.parameters() if not p.requires_grad}
        if len(frozen) == len(list(mixer.parameters())):
            continue
        fully_shard(mixer, mesh=world.mesh, ignored_params=frozen)
        for entry in entries:
            register_fsdp_forward_method(mixer, entry)
