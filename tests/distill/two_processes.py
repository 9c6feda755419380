"""Run as one of several processes: train small stages and print the result of each step as JSON.

Arguments: folder, total steps, step to stop after (0 for none), and stages as
plan:loss:layout:learns, the layout being "packed", "padded" or "gaps" (padded, two steps without a
readable sample), and `learns` as in a recipe, patterns joined by "+". The plan is that of
`small_model`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small import IMAGE_ID
from small_distillation import RandomLoader, make_job

from mmmamba_cli.distill.optimiser import full_tensor
from mmmamba_cli.distill.trainer import StepResult, Stopped, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import World, join_world


def run(world: World, folder: Path, stage: str, steps: int, stop_at: int) -> Any:
    """Train or resume one stage; return the results of steps and a sum of each parameter."""
    plan, loss, layout, learns = stage.split(":")
    options = {"window": 4, "sink_logits": True, "tile_taps": True} if "w" in plan else {}
    job = make_job(
        folder / stage.translate(str.maketrans(":*.+[]", "______")),
        loss,
        plan=plan,
        learns=learns if learns == "new+qkv" else tuple(learns.split("+")),
        steps=steps,
        batch_size=5,
        # Small, because steps amplify rounding.
        lr=1e-3,
        world=world,
        packed=layout == "packed",
        dtype=torch.float64,
        evaluate_every=5,
        **options,
    )
    job = replace(job, held_out=RandomLoader(IMAGE_ID, 5, 1, world.rank, world.size, seed=9))
    if layout == "gaps":
        loader = RandomLoader(IMAGE_ID, 5, 1, world.rank, world.size, unreadable_steps=(4, 11))
        job = replace(job, loader=loader, max_bad_share=0.5)
    progress, rows, bad = Progress(), [], []

    def report(result: StepResult) -> None:
        found = result.held_out
        extra = [found.loss, found.agreement, found.student_nll] if found else []
        numbers = [result.step, result.loss, result.gradient_norm, *extra]
        # NaN compares unequal.
        rows.append([x if math.isfinite(x) else -1.0 for x in numbers])
        bad.extend(result.bad)

    if job.states.steps():
        newest = job.states.path(job.states.steps()[-1]).name
        progress = job.states.read_record(newest).progress
    with suppress(Stopped):
        train(job, progress, report, lambda: progress.step == stop_at)
    learned = job.pair.trainable_parameters()
    total = {name: float(full_tensor(p.detach()).abs().sum()) for name, p in learned.items()}
    return {"steps": rows, "learned": total, "tokens": progress.tokens, "bad": len(bad)}


def main() -> None:
    folder, steps, stop_at, *stages = sys.argv[1:]
    torch.set_num_threads(1)
    with join_world("cpu") as world:
        found = {}
        for stage in stages:
            found[stage] = run(world, Path(folder), stage, int(steps), int(stop_at))
        if world.is_main:
            print(json.dumps(found), flush=True)
    # A gloo thread that releases a tensor at the interpreter's shutdown would abort the process.
    os._exit(0)
