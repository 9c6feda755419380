"""Run as one of several processes: train students of a transformers model, print JSON.

Arguments: folder, and stages as mode:loss:inputs, the mode being "replicate" or "shard".
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from in_place_distillation import make_job, make_stage

from mmmamba_cli.distill.optimiser import full_tensor
from mmmamba_cli.distill.parallelize import ParallelPlan
from mmmamba_cli.distill.trainer import StepResult, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import World, join_world

PLANS = {"replicate": ParallelPlan("replicate"), "shard": ParallelPlan("shard")}


def run(world: World, folder: Path, spec: str) -> Any:
    """Train one stage; return the results of steps and a sum of each parameter."""
    mode, loss, inputs = spec.split(":")
    # A small rate, because steps amplify rounding.
    stage = make_stage(loss, inputs=inputs, steps=2, lr=1e-3)
    states = folder / spec.replace(":", "-")
    job = make_job(states, "qwen3_vl", stage, world, PLANS[mode])
    rows: list[list[float]] = []

    def report(result: StepResult) -> None:
        rows.append([result.loss, result.gradient_norm])
        if result.held_out is not None:
            rows[-1].append(result.held_out.loss)

    progress = train(job, Progress(), report, lambda: False)
    learned = job.pair.trainable_parameters()
    total = {name: float(full_tensor(p.detach()).abs().sum()) for name, p in learned.items()}
    return {
        "steps": rows,
        "learned": total,
        "tokens": progress.tokens,
        "sharded": len(job.gradients.sharded),
    }


def main() -> None:
    folder, *stages = sys.argv[1:]
    torch.set_num_threads(1)
    with join_world("cpu") as world:
        found = {spec: run(world, Path(folder), spec) for spec in stages}
        if world.is_main:
            print(json.dumps(found), flush=True)
    # A gloo thread that releases a tensor at the interpreter's shutdown would abort the process.
    os._exit(0)
