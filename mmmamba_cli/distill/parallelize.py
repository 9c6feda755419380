"""How several processes share the training of a student: replicas, or shards of FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.fsdp import FSDPModule

from mmmamba_cli.devices import free_cpu_memory
from mmmamba_cli.distill.model_pair import ModelPair
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.distributed import (
    BUCKET_BYTES,
    GradientReducer,
    GradientSync,
    World,
    is_sharded,
    shard_mixers,
)

Mode = Literal["replicate", "shard"]
# Share of the free memory that gradients, moments and gathered parameters may take. The rest is for
# activations, whose size is unknown before the first step.
MAX_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class ParallelPlan:
    """What each process holds of the trainable parameters.

    `replicate`: all of them, with gradients and moments. `shard`: a share of each, gathered once
    per step with `keep_gathered`, else for each layer of each micro batch.
    """

    mode: Mode
    keep_gathered: bool = True
    # The decision in words.
    reason: str = ""


def plan_parallel(choice: str, pair: ModelPair, world: World) -> ParallelPlan:
    """Choose what each process holds, by `choice` ("auto", "replicate", "shard") and free memory.

    Weights are in memory already. Gradients and two moments take three times their bytes; shards
    take 4 / N of them for N processes, and a gathered step up to twice (parameters and the buffer
    of the collective) plus gradients. Call it on all processes; all get the same plan.
    """
    if world.size == 1:
        return ParallelPlan("replicate")
    weights = sum(parameter.nbytes for parameter in pair.trainable_parameters().values())
    free = _free_bytes(world)
    limit = None if free is None else MAX_MEMORY_SHARE * free
    replicas, gathered = 3 * weights, round((2 + 4 / world.size) * weights)
    numbers = f"gradients and moments of replicas take {replicas / 2**30:.2f} GiB"
    if free is not None:
        numbers += f", of {free / 2**30:.2f} GiB free per process"
    if choice == "replicate" or (choice == "auto" and (limit is None or replicas <= limit)):
        return ParallelPlan("replicate", reason=f"parameters replicated: {numbers}")
    keep = limit is None or gathered <= limit
    how = "gathered once per step" if keep else "gathered for each layer, as memory is short"
    return ParallelPlan("shard", keep, f"parameters sharded, {how}: {numbers}")


def _free_bytes(world: World) -> int | None:
    """Free memory of the process that has least of it; None if unknown on a process."""
    if world.device.type == "cuda":
        free: int | None = torch.cuda.mem_get_info(world.device)[0]
    else:
        whole = free_cpu_memory()
        free = None if whole is None else whole // world.local_size
    values = world.all_gather([free])
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None


def parallelize(
    pair: ModelPair,
    objective: Objective,
    plan: ParallelPlan,
    world: World,
    bucket_bytes: int = BUCKET_BYTES,
) -> GradientSync:
    """Prepare the student for training on all processes, before its optimiser is built."""
    sharded: list[FSDPModule] = []
    if plan.mode == "shard":
        methods = ("mix", "mixing_matrix") if objective.layer_local else ()
        sharded = shard_mixers(pair.mixers, world, methods)
    trainable = set(pair.trainable_parameters().values())
    # Each parameter once, also if it is tied.
    replicated = [p for p in pair.student.parameters() if p in trainable and not is_sharded(p)]
    if not objective.layer_local:
        # The backward pass runs from the last layer to the first.
        replicated.reverse()
    reducer = GradientReducer(
        replicated,
        world,
        # Each chunk of logits adds to the gradients of the LM head.
        partial=set(pair.lm_head.parameters()),
        average=plan.mode == "shard",
        bucket_bytes=bucket_bytes,
    )
    factor = world.size if plan.mode == "shard" else 1
    return GradientSync(reducer, tuple(sharded), plan.keep_gathered, factor)
