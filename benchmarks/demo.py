"""Demo of all commands on a laptop, in minutes: seed, distill, hybridize, eval, profile, report.

`make demo` runs it on the shipped teacher of composed scenes; it ends with one HTML page. It
resumes where it was stopped. Every step is a command of mmmamba, printed before it runs; what a
student shares with its teacher on held-out lessons is measured by `demo_measurements.py`. The
seeded students and the unseeded one are trained in parallel, each with half of the threads, because
such small steps gain little from more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_measurements import HELD_OUT, HYBRID, LINEAR, SEEDED, UNSEEDED, is_measured, measure

from mmmamba_cli.checkpoint import shipped_models
from mmmamba_cli.cli import main as run_command
from mmmamba_cli.errors import MmmambaError, RunError

TEACHER, RECIPE = "scenes-teacher", "scenes-demo"
SCENES = "scenes"
LANES = (SEEDED, UNSEEDED)
ATTENTION_LAYERS = 2
PICTURES, LESSONS, HELD_OUT_LESSONS = 8, 160, 60
CONTEXTS, BUDGET = "256,1k,4k", 12
MARKER, PAGE = "demo.json", "report.html"
# From random weights W_O must learn too; the recipe freezes it.
SCRATCH = ("--init", "scratch", "--set", "stages.stage3.learns=[model.layers.*.mixer.*]")
MISTAKE, INTERRUPTED = 2, 130
NOTE = (
    "Students distilled here saw a few hundred short conversations, thousands of times fewer than "
    "a student needs: expect the linear ones near guessing. What can be seen already is which way "
    "of beginning leads on. Names that begin with scenes- are models as they ship."
)


@dataclass(frozen=True)
class Step:
    """A command, its purpose, and the file that marks it as done; None: always run."""

    what: str
    words: tuple[str, ...]
    done: str | None = None
    # The lane of the step; None: it runs alone.
    lane: str | None = None


def steps() -> Iterator[Step]:
    """All steps, with paths relative to the demo's folder."""
    size = ("--short", "--pictures", str(PICTURES), "--lessons", str(LESSONS))
    yield Step(
        "scenes for evaluation, and lessons for training",
        ("scenes", "build", "--out", SCENES, *size),
        f"{SCENES}/SCENES.tsv",
    )
    unseen = ("--short", "--pictures", "1", "--lessons", str(HELD_OUT_LESSONS), "--seed", "1")
    yield Step(
        "held-out lessons",
        ("scenes", "build", "--out", HELD_OUT, *unseen),
        f"{HELD_OUT}/lessons.jsonl",
    )
    yield from seeded_steps()
    yield from unseeded_steps()
    yield Step(
        "profile: memory and time against context",
        ("profile", "--run", SEEDED, "--contexts", CONTEXTS, "--budget", str(BUDGET)),
        f"{SEEDED}/profile/profile.json",
    )


def seeded_steps() -> Iterator[Step]:
    yield from linear_steps(
        SEEDED, "a student with mixers initialised from the teacher's attention"
    )
    hybrid = HYBRID.removesuffix("-stage3")
    kept = ("--attn-layers", str(ATTENTION_LAYERS))
    yield Step(
        "hybridize: the teacher's attention back into some layers",
        ("hybridize", "--run", SEEDED, *kept),
        product(SEEDED, hybrid),
        SEEDED,
    )
    yield Step(
        "distill: the hybrid's last stage",
        ("distill", "--run", SEEDED, "--from", hybrid, "--stage", "3", *learning()),
        product(SEEDED, HYBRID),
        SEEDED,
    )
    for name, what in ((LINEAR, "the linear student"), (HYBRID, "the hybrid")):
        words = ("eval", "--run", SEEDED, "--from", name, *asking())
        yield Step(f"eval: {what}", words, lane=SEEDED)


def unseeded_steps() -> Iterator[Step]:
    """Evaluations in this run; the seeded run belongs to the other lane."""
    begin = (*SCRATCH, "--no-report")
    yield from linear_steps(UNSEEDED, "a student with random initial mixers", begin)
    words = ("eval", "--run", UNSEEDED, "--from", LINEAR, "--teacher", *asking())
    yield Step("eval: the unseeded student and the teacher", words, lane=UNSEEDED)
    for name in shipped_models():
        if name in ("scenes-linear", "scenes-hybrid"):
            words = ("eval", "--run", UNSEEDED, "--model", name, *asking())
            yield Step(f"eval: {name}, the shipped student", words, lane=UNSEEDED)


def linear_steps(run: str, what: str, extra: Sequence[str] = ()) -> Iterator[Step]:
    """Seeding and three stages; equal for both runs except for `extra`."""
    seed = ("seed", TEACHER, "--recipe", RECIPE, "--run", run, "--dtype", "fp32")
    yield Step(f"seed: {what}", (*seed, *extra), product(run, "seed"), run)
    yield Step(
        f"distill: three stages, {run}",
        ("distill", "--run", run, *learning()),
        product(run, LINEAR),
        run,
    )


def product(run: str, name: str) -> str:
    return f"{run}/products/{name}/manifest.json"


def learning() -> tuple[str, ...]:
    return ("--data", f"{SCENES}/lessons.jsonl", "--image-root", SCENES)


def asking() -> tuple[str, ...]:
    return ("--suite", "scenes", "--data", SCENES)


def perform(words: Sequence[str]) -> None:
    """Run a command of mmmamba in this process, which saves importing torch each time.

    Raises SystemExit with its exit code if it did not end well.
    """
    before = sys.argv
    sys.argv = ["mmmamba", *words]
    try:
        run_command()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = before


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Create the folder, or resume in one of this demo.

    Raises `RunError` for a folder of something else, or of another version.
    """
    marker = {"format": 2, "recipe": RECIPE, "lessons": LESSONS, "pictures": PICTURES}
    file = folder / MARKER
    if folder.exists() and any(folder.iterdir()):
        if not file.is_file():
            raise RunError(f"{folder} is there and no demo", "choose another folder with --out")
        if overwrite:
            shutil.rmtree(folder)
        elif json.loads(file.read_text(encoding="utf-8")) != marker:
            raise RunError(
                f"{folder} was begun by another version of the demo",
                "start over with --overwrite, or choose another folder with --out",
            )
        else:
            print(f"{folder} is there: going on with it; --overwrite starts over\n")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(marker), encoding="utf-8")


def work_through(numbered: Sequence[tuple[str, Step]]) -> None:
    """Run the steps that are not done, in order, in the working directory."""
    for number, step in numbered:
        title = f"{number} {step.what}"
        if step.done is not None and Path(step.done).is_file():
            print(f"{title}: done before", flush=True)
            continue
        began = time.perf_counter()
        print(f"{title}\n$ mmmamba {' '.join(step.words)}", flush=True)
        perform(step.words)
        print(f"({time.perf_counter() - began:.0f} s)\n", flush=True)


def numbered(listed: Sequence[Step]) -> list[tuple[str, Step]]:
    """Steps with their numbers; comparison and report count too."""
    return [(f"[{i}/{len(listed) + 2}]", step) for i, step in enumerate(listed, start=1)]


def side_by_side() -> None:
    """Run both lanes, each in its own process; their output lines are prefixed with the lane.

    Raises SystemExit with the exit code of a failed lane, after stopping the other.
    """
    threads = max(1, torch.get_num_threads() // len(LANES))
    # Unbuffered, so that lines appear as they are written.
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    print(f"two lanes side by side, {threads} thread{'s'[: threads > 1]} each\n", flush=True)
    began = time.perf_counter()
    lanes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--lane", lane, "--out", "."],
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        for lane in LANES
    ]
    readers = [
        threading.Thread(target=pass_on, args=(name, lane.stdout))
        for name, lane in zip(LANES, lanes, strict=True)
    ]
    for reader in readers:
        reader.start()
    codes = wait_for(lanes)
    for reader in readers:
        reader.join()
    print(f"(both lanes: {time.perf_counter() - began:.0f} s)\n", flush=True)
    # A stopped lane has an exit code too: report the first one that failed.
    failed = [code for code in codes if code]
    if failed:
        raise SystemExit(failed[0])


def pass_on(name: str, lines: Iterable[str]) -> None:
    for line in lines:
        if line.strip():
            sys.stdout.write(f"{name:>8} | {line}")
            sys.stdout.flush()


def wait_for(lanes: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Exit codes in the order in which lanes ended; a failure stops the others."""
    codes: list[int] = []
    running = list(lanes)
    try:
        while running:
            time.sleep(0.1)
            ended = [lane for lane in running if lane.poll() is not None]
            running = [lane for lane in running if lane not in ended]
            codes += [lane.returncode for lane in ended]
            if any(codes):
                for lane in running:
                    lane.terminate()
    finally:
        # Ctrl-C reached the lanes too: they save and stop.
        for lane in running:
            lane.wait()
    return codes


def demo() -> None:
    """Run all steps that are not done, in the working directory."""
    listed = numbered(list(steps()))
    first = next(i for i, (_, step) in enumerate(listed) if step.lane is not None)
    work_through(listed[:first])
    side_by_side()
    work_through([one for one in listed[first:] if one[1].lane is None])
    total = len(listed) + 2
    print(f"[{total - 1}/{total}] compare with the teacher: tokens and layers", flush=True)
    if not is_measured(Path()):
        began = time.perf_counter()
        measure(Path())
        print(f"({time.perf_counter() - began:.0f} s)\n", flush=True)
    print(f"[{total}/{total}] report")
    title = f"{TEACHER} and its students after a few minutes on a CPU"
    read = ("--run", SEEDED, "--beside", UNSEEDED, "--data", SCENES)
    perform(("report", *read, "--title", title, "--note", NOTE, "--out", PAGE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where it is made")
    parser.add_argument("--overwrite", action="store_true", help="start over")
    # Internal: the demo starts itself for one lane.
    parser.add_argument("--lane", choices=LANES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.out.absolute()
    if options.lane is not None:
        os.chdir(folder)
        work_through([one for one in numbered(list(steps())) if one[1].lane == options.lane])
        return 0
    began = time.perf_counter()
    try:
        prepare_folder(folder, options.overwrite)
        os.chdir(folder)
        demo()
    except MmmambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    print(f"\n{time.perf_counter() - began:.0f} s, {torch.get_num_threads()} threads")
    print(f"open in a browser: {folder / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
