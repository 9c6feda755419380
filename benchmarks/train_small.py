"""Tokens per second of stage 3 of the recipe scenes-linear: a small model bound by the host.

    python benchmarks/train_small.py [--workers 8 14] [--steps 60] [--device cuda] [--out FILE]
    python benchmarks/train_small.py --data 'scenes:lessons?long=0.33' --batch-size 96

Draws lessons, seeds the shipped teacher, takes two steps of stages 1 and 2, and measures stage 3 of
`mmmamba distill` for each number of loader workers in two variants: "handed", with segments of
packed rows computed by the loader and few host threads, and "searched", the former variant, with
segments computed on the device and all host threads. The first 15 steps, which compile kernels, are
not counted. Both variants must have the same losses. With `--data`, trains on that source with
inputs of up to 4,096 tokens, only "handed"; if its pictures are drawn while training, also measures
drawing alone. Works in a checkout without installation. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 15
HANDED, SEARCHED = "handed", "searched"


def make_importable(folder: Path) -> None:
    """Make a checkout importable without installation, in child processes too."""
    if importlib.util.find_spec("mmmamba_evals") is None:
        (folder / "mmmamba_evals").symlink_to(ROOT / "evals")
    paths = [str(ROOT), str(folder)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])


def draw(folder: Path, lessons: int) -> Path:
    """Write lessons into `folder`; return the file of their conversations."""
    from mmmamba_evals.scenes.fonts import SEEN, fonts_of
    from mmmamba_evals.scenes.scene_writers import LESSONS, write_lessons
    from mmmamba_evals.scenes.shipped import shipped_atlas
    from mmmamba_evals.scenes.world import make_world

    atlas = shipped_atlas("noto")
    world = make_world(atlas, fonts_of(SEEN))
    write_lessons(folder, atlas, world, seed=0, count=lessons, workers=os.cpu_count() or 1)
    return folder / LESSONS


class Meter:
    """Records time, loss and tokens of each step, and the seconds spent waiting for batches."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, int, float]] = []
        self.waited = 0.0

    def report(self, result: Any) -> None:
        self.rows.append((time.perf_counter(), result.loss, result.tokens, self.waited))

    def timed(self, steps: Any) -> Any:
        """`StepLoader.steps` that measures the waiting time of its consumer."""

        def waiting(loader: Any, first: int, stop: int) -> Iterator[Any]:
            source = steps(loader, first, stop)
            while True:
                began = time.perf_counter()
                batches = next(source, None)
                self.waited += time.perf_counter() - began
                if batches is None:
                    return
                yield batches

        return waiting

    def summary(self) -> dict[str, Any]:
        first = min(WARMUP, len(self.rows) // 2) - 1
        begun, _, _, waited = self.rows[max(0, first)]
        counted = self.rows[max(0, first) + 1 :]
        seconds = counted[-1][0] - begun
        tokens = sum(row[2] for row in counted)
        return {
            "tokens_per_second": round(tokens / seconds),
            "tokens_per_step": round(tokens / len(counted)),
            "seconds_per_step": round(seconds / len(counted), 4),
            "seconds_per_step_waiting_for_batches": round(
                (counted[-1][3] - waited) / len(counted), 4
            ),
            "steps_measured": len(counted),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[8])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lessons", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", help="source of conversations in place of written lessons")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        make_importable(folder)
        found = measure(given, folder)
    printed = json.dumps(found, indent=2)
    print(printed)
    if given.out is not None:
        given.out.write_text(printed + "\n", encoding="utf-8")


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    import transformers

    from mmmamba_cli.checkpoint import open_checkpoint
    from mmmamba_cli.data import StepLoader
    from mmmamba_cli.distill import DistillOptions, StageCallbacks, distill
    from mmmamba_cli.distributed import join_world
    from mmmamba_cli.recipe import load_recipe
    from mmmamba_cli.runs import Run
    from mmmamba_cli.seed import seed_student

    began = time.perf_counter()
    settings: dict[str, Any] = {"teacher": str(ROOT / "evals" / "scenes" / "models" / "teacher")}
    if given.data is None:
        lessons = draw(folder / "lessons", given.lessons)
        settings |= {"data.train": str(lessons), "data.image_root": str(lessons.parent)}
    else:
        settings |= {"data.train": given.data, "data.max_length": 4096, "data.max_tiles": 64}
    drawn = time.perf_counter() - began
    for number in (1, 2, 3):
        settings[f"stages.stage{number}.steps"] = given.steps if number == 3 else 2
        settings[f"stages.stage{number}.batch_size"] = given.batch_size
    recipe = load_recipe("scenes-linear", overrides=settings)
    run = Run(folder / "run")
    with run.lock():
        seed_student(run, open_checkpoint(settings["teacher"]), recipe, dtype=torch.bfloat16)

    def train(stages: tuple[str, ...], workers: int, meter: Meter) -> None:
        chosen = load_recipe("scenes-linear", overrides={**settings, "data.workers": workers})
        watch = StageCallbacks(lambda line: None, lambda *_: None, meter.report, lambda: False)
        with (
            join_world(given.device) as world,
            run.lock_existing(),
            mock.patch.object(StepLoader, "steps", meter.timed(StepLoader.steps)),
        ):
            distill(
                run, chosen, world, watch, wanted=stages, options=DistillOptions(overwrite=True)
            )

    train(("stage1", "stage2"), max(given.workers), Meter())
    found: list[dict[str, Any]] = []
    for workers in given.workers:
        losses = {}
        for way in (HANDED, SEARCHED) if given.data is None else (HANDED,):
            meter = Meter()
            with searched() if way == SEARCHED else nullcontext():
                train(("stage3",), workers, meter)
            losses[way] = [row[1] for row in meter.rows]
            found.append({"workers": workers, "way": way, **meter.summary()})
        if given.data is None:
            found[-1]["same_losses"] = losses[HANDED] == losses[SEARCHED]
    return {
        "what": "stage 3 of scenes-linear, tokens a second",
        "batch_size": given.batch_size,
        "device": torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "results": found,
        **(
            {"lessons": given.lessons, "seconds_drawing": round(drawn, 1)}
            if given.data is None
            else {"data": given.data, **measure_drawing(given, settings)}
        ),
    }


def measure_drawing(given: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """One loader process alone, and its pictures drawn on the device alone; medians of 10 steps."""
    import torch

    from mmmamba_cli.checkpoint import open_checkpoint
    from mmmamba_cli.data import StepLoader, open_corpus
    from mmmamba_cli.runs import open_processor

    processor = open_processor(open_checkpoint(settings["teacher"]))
    assert processor is not None
    loader = StepLoader(
        open_corpus(given.data), processor, batch_size=given.batch_size, max_length=4096,
        batching="packed", max_tiles=64,
    )  # fmt: skip
    device = torch.device(given.device)
    waits = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rows = []
    for step in range(13):
        began = time.perf_counter()
        batches = loader.step(step)
        prepared = time.perf_counter()
        moved = [micro.to(device) for micro in batches.micro_batches]
        waits()
        drawn = time.perf_counter()
        tiles = sum(0 if m.pixel_values is None else len(m.pixel_values) for m in moved)
        rows.append((prepared - began, drawn - prepared, tiles, sum(m.num_tokens for m in moved)))
    # The first steps load textures and reserve memory.
    loading, drawing, tiles_drawn, tokens = (
        sorted(column)[5] for column in zip(*rows[3:], strict=True)
    )
    return {
        "loader_process": {
            "seconds_per_step": round(loading, 4),
            "conversations_per_second": round(given.batch_size / loading),
            "tokens_per_second": round(tokens / loading),
        },
        "seconds_drawing_per_step": round(drawing, 4),
        "tiles_per_step": tiles_drawn,
    }


def searched() -> Any:
    """The former variant: batches without segments, and all host threads of the process."""
    from contextlib import ExitStack

    stack = ExitStack()
    stack.enter_context(
        mock.patch("mmmamba_cli.data.holistic_collator.varlen_metadata", lambda mask, seq_idx: None)
    )
    stack.enter_context(
        mock.patch("mmmamba_cli.distill.trainer.limit_cpu_threads", lambda device: nullcontext())
    )
    return stack


if __name__ == "__main__":
    main()
