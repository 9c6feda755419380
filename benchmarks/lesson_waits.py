"""How long training waits for lessons that loader processes draw meanwhile.

    python benchmarks/lesson_waits.py [--workers 8,14,4] [--steps 300] [--minutes 5] [--out FILE]

The stage --stage of a linear student of scenes-teacher, seeded here, with the recipe and the data
of benchmarks/plans/scenes-long.yaml (`scenes:lessons?...`): model, loader and trainer are those of
`mmmamba distill`, and nothing is saved. --workers are the loader processes of each measurement; the
recipe has 8. The share of the wall time that the training process waits for the next batches is
that of --steps steps behind the first --warmup, in which kernels are compiled and queues fill.
Pictures are drawn by the training process on its device, which is no part of the wait.

Numbers of workers that --out has already are left out (--again repeats them), and after --minutes
training ends: what it has timed until then counts. `--tiny` tries it out with small batches of
short lessons, also on a CPU. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from random_stages import WaitMeter
from result_file import ResultFile

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.distill import trainer
from mmmamba_cli.distill.model_pair import PairPlacement
from mmmamba_cli.distill.parallelize import ParallelPlan, parallelize
from mmmamba_cli.distill.stage_loaders import build_loaders
from mmmamba_cli.distill.stage_models import open_stage_models, trainable_of
from mmmamba_cli.distill.trainer import StepResult, Stopped, TrainingJob, steps_read_late, train
from mmmamba_cli.distill.training_state import Progress, StateFolder
from mmmamba_cli.distributed import World, join_world
from mmmamba_cli.recipe import Recipe, Stage, load_recipe
from mmmamba_cli.runs import Run
from mmmamba_cli.seed import seed_student

PLAN = Path(__file__).parent / "plans" / "scenes-long.yaml"
# Short lessons in small batches.
TINY = {
    "data.train": "scenes:lessons?alter=1",
    "data.max_length": 600,
    "data.max_tiles": 16,
    # Some lessons are longer.
    "data.max_bad_share": 1.0,
}
TINY_ROWS = 2


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    given = parse(words)
    deadline = time.monotonic() + 60 * given.minutes
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    sets = {"data.train": plan["data"], "data.held_out": None, **(TINY if given.tiny else {})}
    recipe = load_recipe(plan["recipe"], (), sets)
    with join_world(given.device) as world, tempfile.TemporaryDirectory() as work:
        what = "share of the wall time of steps that training waits for drawn lessons"
        file = ResultFile(given.out, "by_workers", what, world.device)
        file.result |= {
            "cores": len(os.sched_getaffinity(0)),
            "teacher": plan["teacher"],
            "recipe": plan["recipe"],
            "stage": given.stage,
            "data": recipe.data.train,
        }
        run = Run(Path(work) / "run")
        # The student's values do not change how long a step takes.
        seed_student(run, open_checkpoint(plan["teacher"]), recipe, dtype=torch.bfloat16)
        for workers in file.missing(
            given.workers.split(","), again=given.again, is_late=lambda: time.monotonic() > deadline
        ):
            found = measure(given, recipe, run, int(workers), world, deadline)
            if found is not None:
                file.add(workers, found)
                file.write()
    print(json.dumps(file.result, indent=2))
    return file.result


def make_job(
    given: argparse.Namespace, recipe: Recipe, run: Run, workers: int, world: World
) -> TrainingJob:
    """The job of the stage, with the models of the run and loaders of its recipe."""
    changes: dict[str, Any] = {
        "steps": given.warmup + given.steps + steps_read_late(world.device),
        "evaluate_every": None,
        "save_every": None,
    }
    if world.device.type == "cpu":
        changes["precision"] = "fp32"
    if given.tiny:
        changes |= {"batch_size": TINY_ROWS, "accumulation": 1}
    chosen = next(stage for stage in recipe.stages if stage.name == given.stage)
    stage = Stage.model_validate({**chosen.model_dump(), **changes})
    data = recipe.data.model_copy(update={"workers": workers})
    parent = run.product(run.record.current)
    models = open_stage_models(run, parent.name, None)
    trainable, _ = trainable_of(models, stage)
    loader, _ = build_loaders(
        models.student, recipe.model_copy(update={"data": data}), stage, world, print_line
    )
    pair = models.load(
        trainable,
        PairPlacement(getattr(torch, parent.dtype), stage.precision, world.device),
    )
    objective = models.objective(stage, trainable)
    return TrainingJob(
        stage=stage,
        pair=pair,
        objective=objective,
        gradients=parallelize(pair, objective, ParallelPlan("replicate"), world),
        loader=loader,
        held_out=None,
        max_bad_share=recipe.data.max_bad_share,
        seed=recipe.seed,
        world=world,
        states=StateFolder(run.folder / "states", world),
        settings={"stage": stage.model_dump(mode="json"), "data": {}},
    )


def measure(
    given: argparse.Namespace,
    recipe: Recipe,
    run: Run,
    workers: int,
    world: World,
    deadline: float,
) -> dict[str, Any] | None:
    """Train with `workers` loader processes until the last step or the deadline.

    None, with the reason printed, if no step was timed by then.
    """
    job = make_job(given, recipe, run, workers, world)
    waits, progress, results = WaitMeter(), Progress(), list[StepResult]()
    with (
        waits.patched(),
        mock.patch.object(trainer, "_save", lambda job, state: state.progress.step),
    ):
        try:
            train(job, progress, results.append, lambda: time.monotonic() > deadline)
        except Stopped:
            print(f"{workers} workers: stopped after {progress.step} steps", file=sys.stderr)
    timed = results[given.warmup : given.warmup + given.steps]
    if not timed:
        print(f"{workers} workers: no step behind the warm-up", file=sys.stderr)
        return None
    seconds = [result.tokens / result.tokens_per_second for result in timed]
    waited = waits.seconds[given.warmup : given.warmup + len(timed)]
    return {
        "steps": len(timed),
        "seconds": round(sum(seconds), 3),
        "waited_seconds": round(sum(waited), 3),
        "wait_share": round(sum(waited) / sum(seconds), 4),
        "longest_wait_seconds": round(max(waited), 4),
        "step_seconds": round(statistics.median(seconds), 4),
        "tokens_per_second": round(sum(result.tokens for result in timed) / sum(seconds)),
        "rows": job.stage.batch_size,
    }


def print_line(text: str) -> None:
    print(text, file=sys.stderr)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", default="8,14,4")
    parser.add_argument("--stage", default="stage3")
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--device")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
