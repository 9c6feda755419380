"""Distillation on one, two, four and eight GPUs: strong and weak scaling, restarts, evaluation.

    python benchmarks/scale_distill.py [--only stage1,stage2,stage3] [--gpus 1,2] [--rows 8]
        [--weak 8] [--micro-rows auto] [--parallel auto] [--steps 8] [--minutes 9] [--out FILE]
        [--picture FILE]
    python benchmarks/scale_distill.py --kill --only stage3 --gpus 2
    python benchmarks/scale_distill.py --eval MODEL --suite scenes --gpus 1,2

Random weights in HoVLE-2.6B's shapes and random texts of --length tokens a row; trainer, loader and
processes are those of `mmmamba distill --gpus N`. --rows are the rows of a global step on every
number of GPUs (strong scaling), --weak those of each GPU (weak scaling). A micro batch has as many
as the recipe gives it, or --micro-rows, for example 1. The losses of all numbers of GPUs with the
same rows must agree. --kill kills one process in the middle, starts all again from the last state,
and compares losses with an undisturbed training. --eval evaluates a checkpoint on each number of
GPUs and compares the files.

A part that is in --out already is not repeated (--again repeats it). None is begun after --minutes,
and one that runs then stops after its step and is left out, so that several calls fill one file.
`--tiny` tries it out with three small layers, `--device cpu` without a GPU. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_stages import (
    AUTO,
    GIB,
    HostCollectives,
    StageSetup,
    StepProfiler,
    WaitMeter,
    attempt,
    make_job,
    micro_batch_rows,
    parse_micro_rows,
    release_memory,
    timed_steps,
    write_texts,
)
from result_file import ResultFile
from scale_picture import draw
from scale_ratios import ratios
from torch import Tensor

from mmmamba_cli.data import StepLoader
from mmmamba_cli.devices import pick_device
from mmmamba_cli.distill.trainer import StepResult, Stopped, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import World, join_world
from mmmamba_cli.distributed.launcher import launch
from mmmamba_cli.distributed.process_failures import ProcessKilled

WARMUP = 2
PROFILED = 1
KILL_AT, SAVE_EVERY = 3, 2


@dataclass(frozen=True)
class Part:
    """One training: a stage on a number of GPUs with the rows of a global step.

    `micro_rows` as in `StageSetup`.
    """

    stage: str
    gpus: int
    rows: int
    parallel: str
    micro_rows: int | str = AUTO

    @property
    def name(self) -> str:
        size = f"{self.gpus}-gpus-{self.rows}-rows"
        return f"{self.stage}-{size}-{self.parallel}-micro-{self.micro_rows}"


@dataclass(frozen=True)
class PartGroup:
    """Parts on the same number of GPUs, and the file of their results; it is sent to processes."""

    setups: dict[Part, StageSetup]
    file: ResultFile
    deadline: float


def train_parts(group: PartGroup) -> bool:
    """Train parts one after another, in this process, one of several or alone.

    Process 0 adds each to the file. Returns True, also after the deadline; a failure raises.
    """
    device = next(iter(group.setups.values())).device
    with join_world(device) as world:
        for part, setup in group.setups.items():
            is_late = world.run_on_main(lambda: time.time() > group.deadline)
            release_memory(world.device)
            found = None if is_late else train_part(setup, world)
            if found is None:
                if world.is_main:
                    print(f"{part.name} stopped: no time left", file=sys.stderr)
                break
            if world.is_main:
                group.file.add(part.name, {**asdict(part), "length": setup.length, **found})
                group.file.result["ratios"] = ratios(group.file.parts)
                group.file.write()
        return True


def train_part(setup: StageSetup, world: World) -> dict[str, Any] | None:
    """Train a part; None if its deadline passes, on all processes alike."""
    began = time.perf_counter()
    job, mode = make_job(setup, world)
    is_gpu = world.device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
    results: list[StepResult] = []
    waits, collectives = WaitMeter(), HostCollectives()
    profiler = StepProfiler(world.device, setup.steps, PROFILED, host=not is_gpu)
    with ExitStack() as stack:
        if is_gpu:
            stack.enter_context(profiler.started(StepLoader))
            stack.enter_context(profiler.without_saving())
        stack.enter_context(waits.patched())
        if world.size > 1:
            stack.enter_context(collectives.patched())
        prepared = time.perf_counter()
        try:
            train(job, Progress(), results.append, lambda: time.time() > setup.deadline)
        except Stopped:
            return None
        seconds = time.perf_counter() - prepared
    timed = timed_steps(world.device, WARMUP, setup.steps - (PROFILED if is_gpu else 0))
    peak = torch.cuda.max_memory_allocated(world.device) / GIB if is_gpu else 0.0
    waited = statistics.median(waits.seconds[step] for step in timed)
    peaks, all_waits = world.all_gather([peak]), world.all_gather([waited])
    rates = [results[step].tokens_per_second for step in timed] if results else [0.0]
    found: dict[str, Any] = {
        "mode": mode,
        "micro_batch_rows": micro_batch_rows(job.loader.step(0)),
        "losses": [result.loss for result in results],
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "data_wait_seconds": round(max(all_waits), 4),
        "collectives_per_step": round(collectives.calls / setup.steps, 1),
        "host_share_in_calls_of_collectives": round(collectives.seconds / seconds, 4),
        "seconds_until_first_step": round(prepared - began, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if is_gpu:
        found["peak_gib"] = round(max(peaks), 2)
        found["profiled"] = profiler.summary()
    tokens = setup.rows * setup.length
    found["step_seconds"] = round(tokens / statistics.median(rates), 4) if results else 0.0
    return found


def train_killed(setup: StageSetup) -> dict[str, Any]:
    """`train_part` with states; in its first start, the last process kills itself."""
    marker = setup.folder.parent / f"{setup.folder.name}.killed"
    with join_world(setup.device) as world:
        job, _ = make_job(setup, world)
        progress = Progress()
        if job.states.steps():
            newest = job.states.path(job.states.steps()[-1]).name
            progress = world.run_on_main(lambda: job.states.read_record(newest).progress)
        resumed_after = progress.step
        losses: dict[int, float] = {}

        def report(result: StepResult) -> None:
            losses[result.step] = result.loss

        def should_stop() -> bool:
            is_victim = setup.is_killed and world.rank == world.size - 1
            if is_victim and progress.step == KILL_AT and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        train(job, progress, report, should_stop)
        total = torch.stack([local_sum(p) for p in job.pair.trainable_parameters().values()]).sum()
        return {
            "resumed_after": resumed_after,
            "losses": losses,
            "weights": float(world.all_reduce_sum(total)),
        }


def local_sum(parameter: Tensor) -> Tensor:
    """Sum of the magnitudes of this process's share, on the CPU in fp64."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach().double().abs().sum().cpu()


def run_killed(setup: StageSetup, gpus: int) -> dict[str, Any]:
    """Losses of a training whose process is killed, beside those of an undisturbed one."""
    undisturbed = launch(train_killed, setup, gpus)
    folder = setup.folder.with_name(f"{setup.folder.name}-killed")
    killed = replace(setup, folder=folder, is_killed=True)
    restarts = 0
    while True:
        try:
            found = launch(train_killed, killed, gpus)
            break
        except ProcessKilled as error:
            restarts += 1
            print(error.message, file=sys.stderr)
            if restarts > 1:
                raise
    shared = {step: undisturbed["losses"][step] for step in found["losses"]}
    return {
        "restarts": restarts,
        "resumed_after": found["resumed_after"],
        "losses": found["losses"],
        "undisturbed_losses": undisturbed["losses"],
        "same_losses": found["losses"] == shared,
        "same_weights": found["weights"] == undisturbed["weights"],
    }


def make_setup(given: argparse.Namespace, part: Part, work: Path, deadline: float) -> StageSetup:
    """The stage of a part, whose texts are written."""
    texts = work / f"texts-{part.rows}.jsonl"
    if not texts.is_file():
        write_texts(texts, 4 * part.rows, given.length)
    return StageSetup(
        stage=part.stage,
        rows=part.rows,
        length=given.length,
        steps=2 * KILL_AT if given.kill else given.steps,
        texts=texts,
        folder=work / part.name,
        micro_rows=part.micro_rows,
        parallel=part.parallel,
        tiny=given.tiny,
        device=given.device,
        workers=given.workers,
        save_every=SAVE_EVERY if given.kill else None,
        deadline=deadline,
    )


def run_parts(
    given: argparse.Namespace, parts: Sequence[Part], file: ResultFile, work: Path, deadline: float
) -> None:
    """Train parts on the same number of GPUs, in the same processes unless one fails."""
    waiting = {part: make_setup(given, part, work, deadline) for part in parts}
    while waiting and time.time() <= deadline:
        group = PartGroup(waiting, file, deadline)
        is_finished = attempt("parts", partial(launch, train_parts, group, parts[0].gpus))
        file.read()
        left = [part for part in waiting if part.name not in file.parts]
        # The first of those that are left has failed.
        waiting = {} if is_finished else {part: waiting[part] for part in left[1:]}


def evaluate(given: argparse.Namespace, gpus: Sequence[int], work: Path) -> dict[str, Any]:
    """`mmmamba eval` on each number of GPUs: seconds, and whether the predictions are the same."""
    found: dict[str, Any] = {}
    files = {}
    for number in gpus:
        out = work / f"eval-{number}"
        words = ["--model", given.eval, "--suite", given.suite, "--out", str(out)]
        words += ["--gpus", str(number)] if number > 1 else []
        words += ["--limit", str(given.limit)] if given.limit else []
        words += ["--device", given.device] if given.device else []
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mmmamba_cli", "eval", *words], check=True)
        seconds = time.perf_counter() - began
        timing = [json.loads(file.read_text()) for file in sorted(out.rglob("timing.json"))]
        files[number] = [file.read_bytes() for file in sorted(out.rglob("predictions.tsv"))]
        found[str(number)] = {
            "seconds_with_start": round(seconds, 2),
            "seconds": round(sum(one["seconds"] for one in timing), 2),
            "samples": sum(one["answered"] for one in timing),
        }
    first = gpus[0]
    if not files[first]:
        raise SystemExit(f"{given.eval}: no predictions.tsv was written")
    for number in gpus[1:]:
        row = found[str(number)]
        row["same_predictions"] = files[number] == files[first]
        row["speed_ratio"] = round(found[str(first)]["seconds"] / row["seconds"], 2)
    return {"model": given.eval, "suite": given.suite, "by_gpus": found}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    given = parse(words)
    counts = [int(number) for number in given.gpus.split(",")]
    deadline = time.time() + 60 * given.minutes
    what = "distillation by number of GPUs, HoVLE-2.6B shapes, random weights and texts"
    key = "killed" if given.kill else "parts"
    with tempfile.TemporaryDirectory() as work:
        out = given.out or Path(work) / "result.json"
        file = ResultFile(out, key, what, pick_device(given.device))
        if given.eval:
            file.result["eval"] = evaluate(given, counts, Path(work))
        file.write()
        parts = {} if given.eval else {part.name: part for part in parts_of(given, counts)}
        names = file.missing(parts, again=given.again, is_late=lambda: time.time() > deadline)
        if given.kill:
            for name in names:
                setup = make_setup(given, parts[name], Path(work), deadline)
                found = attempt(name, partial(run_killed, setup, parts[name].gpus))
                if found is not None:
                    file.add(name, {**asdict(parts[name]), "length": given.length, **found})
                    file.write()
        else:
            missing = [parts[name] for name in names]
            for number in counts:
                same = [part for part in missing if part.gpus == number]
                run_parts(given, same, file, Path(work), deadline)
    if given.picture is not None:
        draw(file.result, given.picture)
    print(json.dumps(file.result, indent=2))
    return file.result


def parts_of(given: argparse.Namespace, counts: Sequence[int]) -> list[Part]:
    """Strong scaling with each number of rows, then weak scaling; each part once."""
    found = []
    for stage in given.only.split(","):
        for mode in given.parallel.split(","):
            sizes = [(n, rows) for rows in numbers(given.rows) for n in counts if rows >= n]
            sizes += [(n, n * rows) for rows in numbers(given.weak) for n in counts]
            sizes = [(n, rows) for n, rows in sizes if n > 1 or not given.kill]
            found += [
                Part(stage, n, rows, mode if n > 1 else "auto", given.micro_rows)
                for n, rows in sizes
            ]
    return list(dict.fromkeys(found))


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="stage1,stage2,stage3")
    parser.add_argument("--gpus", default="1,2")
    parser.add_argument("--rows", default="8")
    parser.add_argument("--weak", default="")
    parser.add_argument("--micro-rows", type=parse_micro_rows, default=AUTO)
    parser.add_argument("--parallel", default="auto")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--eval", metavar="MODEL")
    parser.add_argument("--suite", default="scenes")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args(words)
    # A GPU's last step before the profiler is not timed.
    least = WARMUP + PROFILED + 2
    if given.steps < least:
        parser.error(f"--steps {given.steps}: expected {least} or more")
    return given


if __name__ == "__main__":
    main()
