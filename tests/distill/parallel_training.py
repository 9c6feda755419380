"""Run as one of several processes: train small stages and print the result of each step as JSON.

Arguments: folder, step to stop after (0 for none), and stages as
label:mode:steps:plan:loss:layout:learns. The label names the folder of the states. The mode is
"replicate" (in buckets of 4 KiB), "shard", "fused" (sharded, with a fused optimiser and values that
are read a step late) or "layers" (sharded, gathered and reduced in each micro batch); the layout
"packed", "padded", "columns" (micro batches of at most `COLUMNS` columns) or "gaps" (padded, two
steps without a readable sample, and one with a loss that is not finite on one process); `learns` is
as in a recipe, patterns joined by "+". The plan is that of `small_model`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small import IMAGE_ID
from small_distillation import RandomLoader, RowLoader, make_job
from torch import Tensor

from mmmamba_cli.data import ColumnLimit
from mmmamba_cli.distill import trainer
from mmmamba_cli.distill.optimiser import build_optimiser, full_tensor
from mmmamba_cli.distill.parallelize import ParallelPlan
from mmmamba_cli.distill.trainer import StepResult, Stopped, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import GradientReducer, World, join_world

PLANS = {
    "replicate": ParallelPlan("replicate"),
    "shard": ParallelPlan("shard"),
    "fused": ParallelPlan("shard"),
    "layers": ParallelPlan("shard", keep_gathered=False),
}
BUCKET_BYTES = 4096
COLUMNS = 16
# A special token of the small model, which random texts do not contain.
SPOILED_ID, SPOILED_STEP = 3, 4
# FSDP2 calls the last two by other names from torch 2.13 on.
COLLECTIVES = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "gather",
    "all_gather_single": "gather",
    "reduce_scatter_tensor": "scatter",
    "reduce_scatter_single": "scatter",
}


class SpoiledLoader(RandomLoader):
    """One sample of `SPOILED_STEP` has the token `SPOILED_ID`."""

    def samples(self, step: int) -> list[Tensor]:
        rows = super().samples(step)
        if step == SPOILED_STEP:
            rows[-1][0] = SPOILED_ID
        return rows


class Collectives:
    """Records the collectives since the last `take`: kind, elements sent, and whether async."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, int, bool]] = []
        # Number of calls at the end of the backward passes.
        self.during_backward = 0
        for name, kind in COLLECTIVES.items():
            if hasattr(dist, name):
                setattr(dist, name, self._recorded(kind, getattr(dist, name)))

    def _recorded(self, kind: str, call: Any) -> Any:
        @wraps(call)
        def recorded(*arguments: Any, **options: Any) -> Any:
            sent = options.get("input_tensor", options.get("input"))
            if sent is None:
                sent = arguments[0 if kind == "all_reduce" else 1]
            self._calls.append((kind, sent.numel(), bool(options.get("async_op"))))
            return call(*arguments, **options)

        return recorded

    def end_backward(self, flags: Any) -> Any:
        """`gradient_flags`, which is called between the backward passes and what follows them."""

        @wraps(flags)
        def marked(*arguments: Any) -> Any:
            self.during_backward = len(self._calls)
            return flags(*arguments)

        return marked

    def take(self) -> list[tuple[str, int, bool]]:
        taken, self._calls = self._calls, []
        return taken


def run(world: World, collectives: Collectives, folder: Path, stage: str, stop_at: int) -> Any:
    """Train or resume one stage; return the results of steps and a sum of each parameter."""
    label, mode, steps, plan, loss, layout, learns = stage.split(":")
    trainer.build_optimiser = partial(build_optimiser, fused=mode == "fused")
    # As on a GPU.
    trainer.steps_read_late = lambda device: int(mode == "fused")
    options = {"window": 4, "sink_logits": True, "tile_taps": True} if "w" in plan else {}
    job = make_job(
        folder / label,
        loss,
        plan=plan,
        learns=learns if learns == "new+qkv" else tuple(learns.split("+")),
        steps=int(steps),
        batch_size=6,
        accumulation=2,
        # Small, because steps amplify rounding.
        lr=1e-3,
        world=world,
        packed=layout == "packed",
        dtype=torch.float64,
        evaluate_every=5,
        parallel=PLANS[mode],
        bucket_bytes=BUCKET_BYTES,
        **options,
    )
    job = replace(job, held_out=RandomLoader(IMAGE_ID, 5, 1, world.rank, world.size, seed=9))
    if layout == "columns":
        limit = ColumnLimit(COLUMNS)
        job = replace(job, loader=RowLoader(IMAGE_ID, 6, limit, world.rank, world.size))
    if layout == "gaps":
        for model in (job.pair.teacher, job.pair.student):
            model.model.text_embedding.weight.data[SPOILED_ID] = float("inf")
        loader = SpoiledLoader(IMAGE_ID, 6, 2, world.rank, world.size, unreadable_steps=(2, 6))
        job = replace(job, loader=loader, max_bad_share=0.5)
    progress, rows, bad, calls, during_backward = Progress(), [], [], [], []

    def report(result: StepResult) -> None:
        found = result.held_out
        extra = [found.loss, found.agreement, found.student_nll] if found else []
        numbers = [result.step, result.loss, result.gradient_norm, *extra]
        # NaN compares unequal.
        rows.append([x if math.isfinite(x) else -1.0 for x in numbers])
        bad.extend(result.bad)
        calls.append(collectives.take())
        during_backward.append(collectives.during_backward)

    if job.states.steps():
        newest = job.states.path(job.states.steps()[-1]).name
        progress = job.states.read_record(newest).progress
    with suppress(Stopped):
        train(job, progress, report, lambda: progress.step == stop_at)
    collectives.take()
    learned = job.pair.trainable_parameters()
    total = {name: float(full_tensor(p.detach()).abs().sum()) for name, p in learned.items()}
    return {
        "steps": rows,
        "learned": total,
        "tokens": progress.tokens,
        "bad": len(bad),
        "calls": calls,
        "during_backward": during_backward,
        "elements": sum(full_tensor(p).numel() for p in learned.values()),
        "sharded": len(job.gradients.sharded),
    }


def main() -> None:
    folder, stop_at, *stages = sys.argv[1:]
    torch.set_num_threads(1)
    with join_world("cpu") as world:
        collectives = Collectives()
        GradientReducer.gradient_flags = collectives.end_backward(GradientReducer.gradient_flags)
        found = {}
        for stage in stages:
            found[stage] = run(world, collectives, Path(folder), stage, int(stop_at))
        if world.is_main:
            print(json.dumps(found), flush=True)
    # A gloo thread that releases a tensor at the interpreter's shutdown would abort the process.
    os._exit(0)
