"""The whole of mmmamba on a laptop, in minutes: seed, distill, hybridize, eval, profile, report.

`make demo` runs it on the shipped teacher of composed scenes and ends with one page to look at. It
goes on where it was stopped. Every part is a command of mmmamba, printed before it runs; only the
comparison with the teacher token by token, on lessons nobody learned from, is measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmmamba_cli.checkpoint import atomic_write_text, shipped_models
from mmmamba_cli.cli import main as run_command
from mmmamba_cli.data import IGNORED, Batch, StepLoader, open_corpus
from mmmamba_cli.distill.layerwise import prepare
from mmmamba_cli.distill.logits_kl import next_tokens
from mmmamba_cli.distill.pair import Pair, load_pair
from mmmamba_cli.errors import MmmambaError, RunError
from mmmamba_cli.runs import Run, open_processor
from mmmamba_cli.runs.manifest import now

TEACHER, RECIPE = "scenes-teacher", "scenes-demo"
SCENES, HELD_OUT, SEEDED, UNSEEDED = "scenes", "held-out", "seeded", "unseeded"
LINEAR, HYBRID, ATTENTION_LAYERS = "linear-stage3", "hybrid-2-stage3", 2
PICTURES, LESSONS, HELD_OUT_LESSONS = 8, 160, 60
CONTEXTS, BUDGET = "256,1k,4k", 12
MARKER, PAGE, AGREEMENT = "demo.json", "report.html", "comparisons/agreement.json"
# At random, W_O too must learn, which the recipe keeps as it is.
SCRATCH = ("--init", "scratch", "--set", "stages.stage3.learns=[model.layers.*.mixer.*]")
MISTAKE = 2
NOTE = (
    "Students distilled here saw a few hundred short conversations, thousands of times fewer than "
    "a student needs: expect the linear ones near guessing. What can be seen already is which way "
    "of beginning leads on. Names that begin with scenes- are models as they ship."
)


@dataclass(frozen=True)
class Step:
    """A command, what it is for, and the file that says that it was done; none: run it always."""

    what: str
    words: tuple[str, ...]
    done: str | None = None


def steps() -> Iterator[Step]:
    """The commands, with paths that count from the demo's folder."""
    lessons = ("--data", f"{SCENES}/lessons.jsonl", "--image-root", SCENES)
    made = "{}/products/{}/manifest.json".format
    size = ("--pictures", str(PICTURES), "--lessons", str(LESSONS))
    yield Step(
        "draw scenes to ask about, and lessons to learn from",
        ("scenes", "build", "--out", SCENES, *size),
        f"{SCENES}/SCENES.tsv",
    )
    unseen = ("--pictures", "1", "--lessons", str(HELD_OUT_LESSONS), "--seed", "1")
    yield Step(
        "lessons that nobody learns from",
        ("scenes", "build", "--out", HELD_OUT, *unseen),
        f"{HELD_OUT}/lessons.jsonl",
    )
    for run, extra, what in (
        (SEEDED, (), "a student whose mixers begin as the teacher's attention"),
        (UNSEEDED, (*SCRATCH, "--no-report"), "one whose mixers begin at random"),
    ):
        seed = ("seed", TEACHER, "--recipe", RECIPE, "--run", run, "--dtype", "fp32")
        yield Step(f"seed: {what}", (*seed, *extra), made(run, "seed"))
        yield Step(
            f"distill: three stages, {run}",
            ("distill", "--run", run, *lessons),
            made(run, LINEAR),
        )
    hybrid = HYBRID.removesuffix("-stage3")
    kept = ("--attn-layers", str(ATTENTION_LAYERS))
    yield Step(
        "hybridize: the teacher's attention back into some layers",
        ("hybridize", "--run", SEEDED, *kept),
        made(SEEDED, hybrid),
    )
    yield Step(
        "distill: the hybrid's last stage",
        ("distill", "--run", SEEDED, "--from", hybrid, "--stage", "3", *lessons),
        made(SEEDED, HYBRID),
    )
    asked = ("--suite", "scenes", "--data", SCENES)
    yield Step(
        "eval: the linear student and its teacher",
        ("eval", "--run", SEEDED, "--from", LINEAR, "--teacher", *asked),
    )
    yield Step("eval: the hybrid", ("eval", "--run", SEEDED, "--from", HYBRID, *asked))
    yield Step("eval: the unseeded student", ("eval", "--run", UNSEEDED, "--from", LINEAR, *asked))
    for name in shipped_models():
        if name in ("scenes-linear", "scenes-hybrid"):
            words = ("eval", "--run", SEEDED, "--model", name, *asked)
            yield Step(f"eval: {name}, distilled at leisure and shipped", words)
    yield Step(
        "profile: memory and time against context",
        ("profile", "--run", SEEDED, "--contexts", CONTEXTS, "--budget", str(BUDGET)),
        f"{SEEDED}/profile/profile.json",
    )


def measure_agreement(folder: Path) -> None:
    """How often each student's most likely next token is the teacher's, in answers, by lesson."""
    models = {
        LINEAR: (SEEDED, LINEAR),
        HYBRID: (SEEDED, HYBRID),
        f"{LINEAR} ({UNSEEDED})": (UNSEEDED, LINEAR),
    }
    found = {
        label: by_lesson(Run(folder / run), product, folder / HELD_OUT)
        for label, (run, product) in models.items()
    }
    text = {
        "format": 1,
        "title": "Next tokens of answers, on lessons nobody learned from",
        "metric": "same most likely token as the teacher's, %",
        "unit": "lesson",
        "command": "python benchmarks/demo.py",
        "created": now(),
        "models": found,
        "compare": [[LINEAR, f"{LINEAR} ({UNSEEDED})"]],
    }
    place = folder / SEEDED / AGREEMENT
    place.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(place, json.dumps(text, indent=1) + "\n")


@torch.no_grad()
def by_lesson(run: Run, product: str, held_out: Path) -> list[tuple[int, int]]:
    """(tokens where both agree, tokens) in the answers of each lesson."""
    student = run.open_product(product)
    processor = open_processor(student)
    if processor is None:
        raise RunError(f"{student.path} has no tokenizer")
    pair = load_pair(
        run.open_teacher(),
        student,
        (),
        product_dtype=torch.float32,
        precision="fp32",
        device=torch.device("cpu"),
    )
    lessons = StepLoader(
        open_corpus(str(held_out / "lessons.jsonl"), held_out),
        processor,
        batch_size=1,
        max_length=1024,
        max_tiles=1,
        shuffle=False,
        workers=0,
    )
    return [agreeing(pair, step.micro[0]) for step in lessons.steps(0, HELD_OUT_LESSONS)]


def agreeing(pair: Pair, batch: Batch) -> tuple[int, int]:
    prompt = prepare(pair, batch)
    scored = next_tokens(batch) != IGNORED
    best = [
        model.lm_head(model.model(prompt)[scored]).argmax(-1)
        for model in (pair.teacher, pair.student)
    ]
    return int((best[0] == best[1]).sum()), int(scored.sum())


def perform(words: Sequence[str]) -> None:
    """Run a command of mmmamba in this process, which spares a start of torch for each.

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
    """Make the folder, or take up one that this demo began.

    Raises `RunError` for a folder of something else, or of another version.
    """
    marker = {"format": 1, "recipe": RECIPE, "lessons": LESSONS, "pictures": PICTURES}
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


def demo(folder: Path) -> None:
    """All steps that are not done, in `folder`, which becomes the working directory."""
    os.chdir(folder)
    listed = list(steps())
    for number, step in enumerate(listed, start=1):
        title = f"[{number}/{len(listed) + 2}] {step.what}"
        if step.done is not None and Path(step.done).is_file():
            print(f"{title}: done before")
            continue
        began = time.perf_counter()
        print(f"{title}\n$ mmmamba {' '.join(step.words)}", flush=True)
        perform(step.words)
        print(f"({time.perf_counter() - began:.0f} s)\n", flush=True)
    print(f"[{len(listed) + 1}/{len(listed) + 2}] compare with the teacher, token by token")
    if not Path(SEEDED, AGREEMENT).is_file():
        measure_agreement(Path())
    print(f"[{len(listed) + 2}/{len(listed) + 2}] report")
    title = f"{TEACHER} and its students after a few minutes on a CPU"
    read = ("--run", SEEDED, "--beside", UNSEEDED, "--data", SCENES)
    perform(("report", *read, "--title", title, "--note", NOTE, "--out", PAGE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where it is made")
    parser.add_argument("--overwrite", action="store_true", help="start over")
    options = parser.parse_args()
    began, cpu = time.perf_counter(), time.process_time()
    folder = options.out.absolute()
    try:
        prepare_folder(folder, options.overwrite)
        demo(folder)
    except MmmambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"\n{wall:.0f} s, {cpu:.0f} s of CPU, {torch.get_num_threads()} threads")
    print(f"open in a browser: {folder / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
