"""Distillation of Qwen3-VL of 2 and 8 B parameters on one GPU, beside that of HoVLE-2.6B.

    python benchmarks/distill_in_place.py [--only 'qwen3-vl-2b-*,hovle-*'] [--rows 4]
        [--length 8192] [--micro-rows 1] [--packed] [--sdpa] [--steps 4] [--minutes 9] [--out FILE]
        [--tiny]

Random weights in the shapes of the published models, trained by the trainer of `mmmamba distill`
with the stages of the recipe qwen3-vl-hybrid (HoVLE: mmmamba-linear). A step has --rows rows,
--micro-rows of them in a micro batch; `auto` gives it as many as `accumulation: auto` does. Half of
a row's tokens are four pictures, which run through the vision tower, and 512 tokens are answers;
HoVLE, which has no tower, gets texts, all of whose tokens are scored. Rows of Qwen3-VL are in
memory beforehand: the wait for data is not measured. A row of Qwen3-VL is one conversation, or with
--packed four, one for each picture. With --sdpa its text decoder attends as in transformers, with
PyTorch's attention and a mask of padded and packed rows, instead of the kernels of distillation.

Parts are MODEL-STAGE, and MODEL-stage3-VARIANT with checkpointing: auto: `auto` changes nothing
else, `lora` puts adapters on q, k and v, and all weights learn of the upper half of the text layers
(`upper`) or of all (`layers`). --only takes shell patterns. Each part has tokens/s (the median of
--steps steps after two), peak memory, its estimate by `distill --dry-run`, and the share of time
with a kernel on the GPU, over one more step under torch.profiler. One that runs out of memory says
so.

A part that is in --out already is not repeated (--again repeats it). None is begun after --minutes,
and one that runs then stops after its step and is left out, so that several calls fill one file.
`--tiny` tries it out with a few small layers, also on a CPU. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import random_qwen3_vl
import random_stages
import torch
from random_qwen3_vl import QwenSetup
from random_stages import (
    GIB,
    StageSetup,
    StepProfiler,
    attempt,
    micro_batch_rows,
    parse_micro_rows,
    release_memory,
    write_texts,
)
from result_file import ResultFile

from mmmamba_cli.distill.trainer import StepResult, TrainingJob, train
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import World, join_world
from mmmamba_cli.teachers.anatomy import text_decoder

WARMUP, PROFILED = 2, 1
STAGES = ("stage1", "stage2", "stage3")
HOVLE = "hovle-2.6b"
LORA = {"rank": 16, "alpha": 32, "targets": ["q_proj", "k_proj", "v_proj"]}
# Variants of stage 3 by model, see `changes_of`.
MODELS = {
    HOVLE: ("auto",),
    "qwen3-vl-2b": ("auto",),
    "qwen3-vl-8b": ("auto", "lora", "upper", "layers"),
}


@dataclass(frozen=True)
class Part:
    """A stage of a model; `variant` names changes of the recipe's stage."""

    model: str
    stage: str
    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.model, self.stage, self.variant)))


def changes_of(variant: str, layers: int) -> dict[str, Any]:
    """The settings of the recipe's stage that a variant changes, for a model of `layers`."""
    if not variant:
        return {}
    # The upper half, or all of them.
    first = {"upper": layers // 2, "layers": 0}.get(variant)
    learns = (
        {}
        if first is None
        else {"learns": [f"*.language_model.layers.{layer}.*" for layer in range(first, layers)]}
    )
    return {"checkpointing": "auto", **learns, **({"lora": LORA} if variant == "lora" else {})}


def parts_of(patterns: str) -> list[Part]:
    """The parts whose names match one of the shell `patterns`, separated by commas."""
    found = []
    for model, variants in MODELS.items():
        found += [Part(model, stage) for stage in STAGES]
        found += [Part(model, "stage3", variant) for variant in variants]
    listed = patterns.split(",")
    return [part for part in found if any(fnmatchcase(part.name, one) for one in listed)]


def make_job(
    given: argparse.Namespace, part: Part, work: Path, world: World
) -> tuple[TrainingJob, dict[str, Any]]:
    """The job of a part, and the estimate of its memory where it has one."""
    # One more than those to time, see `timed_steps`.
    steps = WARMUP + given.steps + 1 + PROFILED
    folder = work / part.name
    if part.model == HOVLE:
        texts = work / "texts.jsonl"
        if not texts.is_file():
            write_texts(texts, 4 * given.rows, given.length)
        setup = StageSetup(
            stage=part.stage,
            rows=given.rows,
            length=given.length,
            steps=steps,
            texts=texts,
            folder=folder,
            micro_rows=given.micro_rows,
            checkpointing=changes_of(part.variant, 0).get("checkpointing"),
            tiny=given.tiny,
        )
        return random_stages.make_job(setup, world)[0], {}
    size = part.model.rpartition("-")[2].upper()
    layers = random_qwen3_vl.teacher_config(size, given.tiny).text_config.num_hidden_layers
    changes = changes_of(part.variant, layers)
    qwen = QwenSetup(
        size=size,
        stage=part.stage,
        changes=changes,
        rows=given.rows,
        micro_rows=given.micro_rows,
        length=given.length,
        steps=steps,
        folder=folder,
        tiny=given.tiny,
        packed=given.packed,
    )
    job, memory = random_qwen3_vl.make_job(qwen, world)
    if given.sdpa:
        for model in (job.pair.teacher, job.pair.student):
            text_decoder(model).config._attn_implementation = "sdpa"
    return job, {"estimated_gib": round(memory.total / GIB, 2)}


def measure(
    given: argparse.Namespace, part: Part, work: Path, world: World, should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Train a part for a few steps. Raises `Stopped` if `should_stop` says so."""
    device = world.device
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    job, found = make_job(given, part, work, world)
    prepared = time.perf_counter() - began
    profiler = StepProfiler(device, job.stage.steps, PROFILED, host=not is_gpu)
    results: list[StepResult] = []
    progress = Progress()
    with ExitStack() as stack:
        stack.enter_context(profiler.without_saving())
        stack.enter_context(profiler.started(type(job.loader)))
        train(job, progress, results.append, should_stop)
    rates = [results[i].tokens_per_second for i in range(WARMUP, WARMUP + given.steps)]
    learning = job.pair.trainable_parameters().values()
    found |= {
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "learning_parameters": sum(parameter.numel() for parameter in learning),
        "accumulation": job.stage.accumulation,
        "micro_batch_rows": micro_batch_rows(job.loader.step(0)),
        "checkpointing": job.stage.checkpointing,
        "recomputation": progress.recomputation,
        "losses": [result.loss for result in results],
        "profiled": profiler.summary(),
        "seconds_until_first_step": round(prepared, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if is_gpu:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 2)
    return found


def run_part(
    given: argparse.Namespace, part: Part, work: Path, world: World, deadline: float
) -> dict[str, Any] | None:
    """What `measure` finds, or a note that memory ran out; None, with the reason printed, else."""

    def run() -> dict[str, Any]:
        try:
            return measure(given, part, work, world, lambda: time.monotonic() > deadline)
        except torch.OutOfMemoryError as error:
            peak = round(torch.cuda.max_memory_allocated(world.device) / GIB, 2)
            return {"out_of_memory": str(error).splitlines()[0], "peak_gib": peak}

    # Adapters, for example, need a package that may be missing.
    return attempt(part.name, run)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    given = parse(words)
    deadline = time.monotonic() + 60 * given.minutes
    with join_world(given.device) as world, tempfile.TemporaryDirectory() as work:
        what = "distillation of Qwen3-VL and HoVLE-2.6B, random weights"
        file = ResultFile(given.out, "parts", what, world.device)
        if world.device.type == "cuda":
            total = torch.cuda.get_device_properties(world.device).total_memory
            file.result["device_gib"] = round(total / GIB, 2)
        # One row a micro batch, as in older files, has no suffix.
        suffix = f"-micro-{given.micro_rows}" if given.micro_rows != 1 else ""
        suffix += "-packed" * given.packed + "-sdpa" * given.sdpa
        parts = {part.name + suffix: part for part in parts_of(given.only)}
        sizes = {"rows": given.rows, "length": given.length}
        for name in file.missing(
            parts, again=given.again, is_late=lambda: time.monotonic() > deadline
        ):
            found = run_part(given, parts[name], Path(work), world, deadline)
            release_memory(world.device)
            if found is not None:
                file.add(name, {**asdict(parts[name]), **sizes, **found})
                file.write()
    print(json.dumps(file.result, indent=2))
    return file.result


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="PATTERN,...")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--micro-rows", type=parse_micro_rows, default=1)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--sdpa", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    if not parts_of(given.only):
        parser.error(f"--only {given.only}: no part has such a name")
    for name in ("packed", "sdpa"):
        if getattr(given, name) and any(part.model == HOVLE for part in parts_of(given.only)):
            parser.error(f"--{name} is for Qwen3-VL: name its parts with --only")
    return given


if __name__ == "__main__":
    main()
