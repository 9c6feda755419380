"""Where the time of a training step goes, stage by stage, on one GPU.

    python benchmarks/distill_budget.py [--stages stage1,stage2,stage3] [--rows 8] [--length 8192]
                                        [--micro-rows auto] [--checkpointing auto] [--minutes 9]
                                        [--out FILE] [--tiny]

Random weights in HoVLE-2.6B's shapes and random texts; trainer and loader are those of `mmmamba
distill`, with rows of --length tokens. A micro batch has as many as the recipe gives it, or
--micro-rows, for example 1. The first --warmup steps compile kernels, the
next --steps are timed, and the last --profiled ones run under torch.profiler, which slows the host.
Of these, the table has seconds per step of the host in each part of the loop and of the device in
kernels. "read" is the host's wait for the values of the step before: it is long where the device is
the limit, and zero where the host is. With --out, stages are added to those of the file. None is
begun after --minutes, and one that runs then stops after its step and is left out. `--tiny` tries
it out with three small layers, also on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_stages import (
    AUTO,
    GIB,
    StageSetup,
    StepProfiler,
    WaitMeter,
    attempt,
    environment,
    make_job,
    micro_batch_rows,
    parse_micro_rows,
    recorded_events,
    timed_steps,
    write_result,
    write_texts,
)

from mmmamba_cli.data import StepLoader
from mmmamba_cli.distill import trainer
from mmmamba_cli.distill.metrics import MetricsLog, metrics_row
from mmmamba_cli.distill.trainer import StepResult, steps_read_late, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import join_world

# Functions of the trainer by the part of the step that they are.
PARTS = {
    "forward and backward": "_accumulate",
    "norm and clip": "DeviceValues",
    "optimiser": "step_if",
    "read": "read_step",
}
PREFIX = "part: "
LOGGING, DATA = "logging", "wait for data"


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stages", default="stage1,stage2,stage3")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--micro-rows", type=parse_micro_rows, default=AUTO)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profiled", type=int, default=2)
    parser.add_argument("--checkpointing", choices=("true", "false", "auto"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    result: dict[str, Any] = {"what": "time of a training step, HoVLE-2.6B shapes, random weights"}
    stages: dict[str, Any] = {}
    if given.out is not None and given.out.is_file():
        stages = json.loads(given.out.read_text())["stages"]
    deadline = time.monotonic() + 60 * given.minutes
    with join_world(given.device) as world, tempfile.TemporaryDirectory() as work:
        texts = Path(work) / "texts.jsonl"
        write_texts(texts, 4 * given.rows, given.length)
        for name in given.stages.split(","):
            if time.monotonic() > deadline:
                print(f"no time left for {name}", file=sys.stderr)
                continue
            run = partial(measure, given, name, texts, Path(work) / name, world, deadline)
            found = attempt(name, run)
            if found is None:
                continue
            stages[name] = found
            print(table(name, stages[name]), flush=True)
            result |= {**environment(world.device), "stages": dict(sorted(stages.items()))}
            if given.out is not None:
                write_result(given.out, result)
    return result


def measure(
    given: argparse.Namespace, name: str, texts: Path, folder: Path, world: Any, deadline: float
) -> dict[str, Any]:
    """Train a stage for the steps of all three kinds. Raises `Stopped` after the deadline."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    # A GPU's last step before the profiler is not timed, see `timed_steps`.
    steps = given.warmup + given.steps + steps_read_late(world.device) + given.profiled
    chosen = {"true": True, "false": False}.get(given.checkpointing, given.checkpointing)
    setup = StageSetup(
        stage=name,
        rows=given.rows,
        length=given.length,
        steps=steps,
        texts=texts,
        folder=folder,
        micro_rows=given.micro_rows,
        checkpointing=chosen,
        tiny=given.tiny,
    )
    job, _ = make_job(setup, world)
    profiler, waits, progress = (
        StepProfiler(world.device, steps, given.profiled),
        WaitMeter(),
        Progress(),
    )
    results: list[StepResult] = []
    log = MetricsLog(folder, 0, folder / "board")

    def report(result: StepResult) -> None:
        with torch.profiler.record_function(PREFIX + LOGGING):
            log.write(metrics_row(result))
        results.append(result)

    with ExitStack() as stack:
        stack.callback(log.close)
        stack.enter_context(waits.patched())
        stack.enter_context(profiler.without_saving())
        stack.enter_context(profiler.started(StepLoader))
        for part, function in PARTS.items():
            run = recorded(PREFIX + part, getattr(trainer, function))
            stack.enter_context(mock.patch.object(trainer, function, run))
        train(job, progress, report, lambda: time.monotonic() > deadline)
    chosen_steps = timed_steps(world.device, given.warmup, steps - given.profiled)
    timed = [results[step] for step in chosen_steps]
    rates = [result.tokens_per_second for result in timed]
    timed_waits = [waits.seconds[step] for step in chosen_steps]
    seconds = [result.tokens / result.tokens_per_second for result in timed]
    found: dict[str, Any] = {
        "rows": given.rows,
        "length": given.length,
        "accumulation": job.stage.accumulation,
        "micro_batch_rows": micro_batch_rows(job.loader.step(0)),
        "tokens_per_second": round(statistics.median(rates)),
        "step_seconds": round(statistics.median(seconds), 4),
        "step_seconds_range": [round(min(seconds), 4), round(max(seconds), 4)],
        "data_wait_seconds": round(statistics.median(timed_waits), 4),
        "recomputation": progress.recomputation,
        "checkpointing": job.stage.checkpointing,
        "loss": results[-1].loss,
        "profiled": profiler.summary(),
        "host_seconds": host_seconds(profiler, given.profiled),
    }
    if world.device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated(world.device) / GIB, 2)
    return found


def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` as a range of the profile."""

    def run(*arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(name):
            return call(*arguments, **options)

    return run


def host_seconds(profiler: StepProfiler, steps: int) -> dict[str, float]:
    """Seconds of the host per profiled step in each part, and outside of them."""
    found = dict.fromkeys((DATA, *PARTS, LOGGING), 0.0)
    for event in recorded_events(profiler.profile):
        part = event.name().removeprefix(PREFIX)
        if part in found and event.device_type() == torch.autograd.DeviceType.CPU:
            found[part] += (event.end_ns() - event.start_ns()) / 1e9
    rest = profiler.seconds - sum(found.values())
    return {part: round(value / steps, 4) for part, value in {**found, "rest": rest}.items()}


def table(name: str, row: dict[str, Any]) -> str:
    """The budget of a stage as text."""
    seen = row["profiled"]
    lines = [
        f"{name}: {row['tokens_per_second']:,} tokens/s, {row['step_seconds']} s a step, "
        f"GPU busy {100 * seen['gpu_busy_share']:.1f} %, {seen['launches']} launches in "
        f"{seen['launch_seconds']} s, {seen['waits']} waits",
        f"  {'kernels':<22}{seen['kernel_seconds']:>9.4f}",
    ]
    lines += [f"  host: {part:<16}{value:>9.4f}" for part, value in row["host_seconds"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
