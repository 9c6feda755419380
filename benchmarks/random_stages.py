"""Stages of distillation on random weights in HoVLE-2.6B's shapes, for benchmarks.

The trainer, the loader and the processes are those of `mmmamba distill`. Texts are random words,
long enough that every row has the full length; nothing is written but the states of --kill.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from distill_full_size import make_pair
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import mmmamba_cli
from mmmamba_cli.architecture import LINEAR, default_mixer
from mmmamba_cli.checkpoint import hovle
from mmmamba_cli.data import StepBatches, StepLoader, open_corpus
from mmmamba_cli.distill import trainer
from mmmamba_cli.distill.micro_batches import stage_accumulation
from mmmamba_cli.distill.objective import build_objective
from mmmamba_cli.distill.parallelize import parallelize, plan_parallel
from mmmamba_cli.distill.trainer import Stopped, TrainingJob, steps_read_late
from mmmamba_cli.distill.training_state import StateFolder
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.processing import processor_from_hovle
from mmmamba_cli.recipe import Stage, load_recipe

TOKENIZER = Path(__file__).parents[1] / "tests" / "processing" / "small.model"
SEED = 0
GIB = 2**30
# Calls of the CUDA runtime and driver by their prefix.
HOST_CALLS = {
    "launch": ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"),
    "wait": ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"),
}
NCCL = "nccl"
# Rows of a micro batch as the recipe has them: `accumulation: auto`.
AUTO = "auto"

Result = TypeVar("Result")


@dataclass(frozen=True)
class StageSetup:
    """A stage to train for a few steps; it is sent to processes.

    `rows` are those of a global step, `micro_rows` those of a micro batch of one process, a number
    or `AUTO`. `checkpointing` None is that of the recipe.
    """

    stage: str
    rows: int
    length: int
    steps: int
    texts: Path
    folder: Path
    micro_rows: int | str = AUTO
    parallel: str = "auto"
    checkpointing: bool | str | None = None
    tiny: bool = False
    device: str | None = None
    workers: int = 1
    save_every: int | None = None
    # Whether a process kills itself in the middle.
    is_killed: bool = False
    # When training stops, on the clock of `time.time`, which processes share.
    deadline: float = math.inf


def parse_micro_rows(text: str) -> int | str:
    """The value of --micro-rows: a number from 1 on, or `AUTO`."""
    if text == AUTO or (text.isdecimal() and int(text)):
        return text if text == AUTO else int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 1, or {AUTO}")


def accumulation_of(rows: int, micro_rows: int | str, processes: int) -> int | str:
    """`accumulation` of a stage whose steps have `rows` rows, of which a micro batch has some."""
    if micro_rows == AUTO:
        return AUTO
    return max(1, rows // (processes * int(micro_rows)))


def micro_batch_rows(batches: StepBatches) -> list[int]:
    """Rows of each micro batch of a step."""
    return [len(micro.labels) for micro in batches.micro_batches]


def shapes(tiny: bool) -> dict[str, Any]:
    """HoVLE-2.6B's config, or that of a model of three small layers to try a benchmark out."""
    raw = copy.deepcopy(hovle.ARCHITECTURES["hovle-2.6b"])
    if tiny:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        raw["embedding_config"] |= sizes | {"num_hidden_layers": 1, "llm_hidden_size": 32}
        raw["llm_config"] |= sizes | {"num_hidden_layers": 2}
    return raw


def write_texts(file: Path, rows: int, length: int) -> None:
    """Write `rows` texts of at least `length` tokens: a random word is a token or more."""
    rng = random.Random(SEED)
    with file.open("w", encoding="utf-8") as handle:
        for _ in range(rows):
            letters = ("".join(rng.choices("abcdefghijklmnop", k=3)) for _ in range(length))
            handle.write(json.dumps({"text": " ".join(letters)}) + "\n")


def make_job(setup: StageSetup, world: World) -> tuple[TrainingJob, str]:
    """The job of a stage on this process, and how parameters are divided, in words."""
    recipe = load_recipe("mmmamba-linear")
    chosen = next(one for one in recipe.stages if one.name == setup.stage)
    changes: dict[str, Any] = {
        "steps": setup.steps,
        "batch_size": setup.rows,
        "accumulation": accumulation_of(setup.rows, setup.micro_rows, world.size),
        "max_length": setup.length,
        "evaluate_every": None,
        "save_every": setup.save_every,
    }
    if world.device.type == "cpu":
        changes["precision"] = "fp32"
    if setup.checkpointing is not None:
        changes["checkpointing"] = setup.checkpointing
    stage = Stage.model_validate(chosen.model_copy(update=changes).model_dump())
    raw = shapes(setup.tiny)
    pair = make_pair(raw, stage, default_mixer(LINEAR), str(world.device), stage.precision)
    for parameter in pair.trainable_parameters().values():
        parameter.requires_grad_()
    objective = build_objective(stage, pair.student.config, pair.trainable)
    plan = plan_parallel(setup.parallel, pair, world)
    loader = StepLoader(
        open_corpus(str(setup.texts), None),
        processor_from_hovle(raw, TOKENIZER),
        batch_size=stage.batch_size,
        accumulation=stage_accumulation(stage),
        max_length=setup.length,
        seed=SEED,
        workers=setup.workers,
        pin_memory=world.device.type == "cuda",
        rank=world.rank,
        world_size=world.size,
    )
    job = TrainingJob(
        stage=stage,
        pair=pair,
        objective=objective,
        gradients=parallelize(pair, objective, plan, world),
        loader=loader,
        held_out=None,
        max_bad_share=0.0,
        seed=SEED,
        world=world,
        states=StateFolder(setup.folder, world),
        settings={"stage": stage.model_dump(mode="json"), "data": {}},
    )
    return job, plan.mode


def release_memory(device: torch.device) -> None:
    """Give the memory of a part that has ended back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed_steps(device: torch.device, warmup: int, steps: int) -> range:
    """Indices of the steps to time, of `steps` ones before those to profile.

    A GPU's step is read when the next one is queued, so that the time of the last one includes the
    start of the profiler.
    """
    return range(warmup, steps - steps_read_late(device))


class WaitMeter:
    """Seconds that the training loop waited for batches, by step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def patched(self) -> Any:
        """Measures `StepLoader.steps` while active."""
        steps = StepLoader.steps

        def waiting(loader: StepLoader, first: int, stop: int) -> Iterator[Any]:
            source = steps(loader, first, stop)
            while True:
                began = time.perf_counter()
                with torch.profiler.record_function("part: wait for data"):
                    batches = next(source, None)
                if batches is None:
                    return
                self.seconds.append(time.perf_counter() - began)
                yield batches

        return mock.patch.object(StepLoader, "steps", waiting)


class StepProfiler:
    """Profiles the last steps of a training, up to and without its last saved state.

    Without `host`, operators are left out, which slow the host while they are recorded.
    """

    def __init__(self, device: torch.device, steps: int, profiled: int, *, host: bool = True):
        kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        if host or not kinds:
            kinds.append(ProfilerActivity.CPU)
        self.profile = profile(activities=kinds, acc_events=True)
        self._device, self._first, self._number = device, steps - profiled, profiled
        self._began = self.seconds = 0.0

    def started(self, loader: type) -> Any:
        """While active, the first step to profile that `loader.steps` gives starts the profiler."""
        steps = loader.steps  # type: ignore[attr-defined]

        def watched(one: Any, first: int, stop: int) -> Any:
            return self.patched(steps(one, first, stop))

        return mock.patch.object(loader, "steps", watched)

    def patched(self, batches: Any) -> Any:
        """`batches`, an iterator of steps, with the profiler started before the first of them."""
        for one in batches:
            if one.step == self._first:
                self._synchronize()
                self.profile.start()
                self._began = time.perf_counter()
            yield one

    def stop(self) -> None:
        self._synchronize()
        self.seconds = time.perf_counter() - self._began
        self.profile.stop()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def without_saving(self) -> Any:
        """Stops the profiler where the last state would be saved, and saves none."""

        def stop(job: TrainingJob, state: Any) -> int:
            if state.progress.step == job.stage.steps:
                self.stop()
            return int(state.progress.step)

        return mock.patch.object(trainer, "_save", stop)

    def summary(self) -> dict[str, Any]:
        """Seconds per step of kernels, launches, waits and collectives; shares of the wall time.

        On a CPU there are no kernels.
        """
        kernels: list[tuple[float, float]] = []
        collectives: list[tuple[float, float]] = []
        calls, host_seconds = dict.fromkeys(HOST_CALLS, 0), dict.fromkeys(HOST_CALLS, 0.0)
        for event in recorded_events(self.profile):
            name, begin, end = event.name(), event.start_ns() / 1e9, event.end_ns() / 1e9
            if event.device_type() == DeviceType.CUDA:
                # Ranges of the host, such as those of FSDP2, are listed for the device too.
                if not event.is_user_annotation():
                    chosen = collectives if NCCL in name.lower() else kernels
                    chosen.append((begin, end))
                continue
            for kind, names in HOST_CALLS.items():
                if name.startswith(names):
                    calls[kind] += 1
                    host_seconds[kind] += end - begin
        computing, communicating = covered(kernels), covered(collectives)
        busy = covered([*kernels, *collectives])
        number, wall = self._number, self.seconds
        return {
            "steps": number,
            "seconds": round(wall / number, 4),
            "gpu_busy_share": round(busy / wall, 4),
            "kernel_seconds": round(computing / number, 4),
            "communication_seconds": round(communicating / number, 4),
            # Communication that no kernel overlaps.
            "communication_share": round((busy - computing) / wall, 4),
            "launches": calls["launch"] // number,
            "launch_seconds": round(host_seconds["launch"] / number, 4),
            "waits": calls["wait"] // number,
            "wait_seconds": round(host_seconds["wait"] / number, 4),
        }


def recorded_events(recorded: Any) -> Any:
    """The events of a `torch.profiler.profile` as Kineto has them.

    Its own `events` makes a Python object of each, in minutes for the million of a step.
    """
    return recorded.profiler.kineto_results.events()


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


class HostCollectives:
    """Number of collectives, and seconds that the host spends in their calls."""

    NAMES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_object")

    def __init__(self) -> None:
        self.calls = 0
        self.seconds = 0.0

    def timed(self, call: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.calls += 1
                self.seconds += time.perf_counter() - began

        return run

    def patched(self) -> Any:
        calls = {name: self.timed(getattr(dist, name)) for name in self.NAMES}
        return mock.patch.multiple(dist, **calls)


def environment(device: torch.device) -> dict[str, Any]:
    """Command, date, device and versions of a result."""
    is_gpu = device.type == "cuda"
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if is_gpu else "CPU",
        "versions": {
            "mmmamba": mmmamba_cli.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": SEED,
    }


def attempt(name: str, work: Callable[[], Result]) -> Result | None:
    """The result of a part; None, with the reason printed, if it stopped or failed.

    The other parts of a benchmark go on.
    """
    try:
        return work()
    except Stopped:
        print(f"{name} stopped: no time left", file=sys.stderr)
    except MmmambaError as error:
        print(f"{name} failed: {error.message}", file=sys.stderr)
    except Exception:  # noqa: BLE001  a fault of one part must not cost the others
        traceback.print_exc()
        print(f"{name} failed", file=sys.stderr)
    return None


def write_result(file: Path | None, result: dict[str, Any]) -> None:
    """Replace the file at once, so that a call that runs out of time loses nothing."""
    if file is not None:
        partial = file.with_name(f".{file.name}")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(file)
