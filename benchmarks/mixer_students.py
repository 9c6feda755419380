"""Students of scenes-teacher with several mixers, distilled alike: agreement with the teacher.

    python benchmarks/mixer_students.py --out FOLDER [--variants mamba2 mamba2:conv_width=9 ...]
        [--steps 48 64 192] [--lessons 500] [--seed 0] [--result FILE]

A variant is KIND[:OPTION=VALUE,...] with the options of the recipe's section `mixer`. Every variant
is seeded and distilled by the commands of mmmamba with the recipe scenes-demo, the given steps and
the same lessons in the same order. Measured are the answers to held-out lessons, teacher-forced
(`token_agreement`), and the accuracy on the suite `scenes`. A run that is there is not made again,
so a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from token_agreement import COMPARISONS, Shares, by_lesson

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.evaluate.bootstrap import NUM_RESAMPLES, resample_counts
from mmmamba_cli.runs import Run
from mmmamba_cli.runs.manifest import package_versions, utc_timestamp

TEACHER, RECIPE, STUDENT = "scenes-teacher", "scenes-demo", "linear-stage3"
STAGES = ("stage1", "stage2", "stage3")
VARIANTS = (
    "mamba2",
    "mamba2:conv_width=9",
    "mamba2:tile_taps=true",
    "gated_delta",
    "kda",
    "window:window=64,sinks=4,sink_logits=true",
)


def mmmamba(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "mmmamba_cli", *map(str, words)], check=True)


def draw(out: Path, lessons: int, seed: int) -> None:
    """The suite with its training lessons, and held-out lessons."""
    if not (out / "scenes" / "lessons.jsonl").is_file():
        size = ("--pictures", 20, "--lessons", lessons, "--seed", seed)
        mmmamba("scenes", "build", "--out", out / "scenes", "--short", *size)
    if not (out / "held-out" / "lessons.jsonl").is_file():
        size = ("--pictures", 1, "--lessons", 80, "--seed", seed + 1)
        mmmamba("scenes", "build", "--out", out / "held-out", "--short", *size)


def make_student(out: Path, variant: str, steps: Sequence[int], seed: int) -> Run:
    """Seed and distill the student of a variant, and evaluate it on the suite."""
    kind, _, options = variant.partition(":")
    sets = [f"mixer.kind={kind}", *(f"mixer.{one}" for one in options.split(",") if one)]
    sets += [f"stages.{stage}.steps={n}" for stage, n in zip(STAGES, steps, strict=True)]
    run = Run(out / variant.replace(":", "-").replace(",", "-").replace("=", "-"))
    words = ("--run", run.folder)
    if STUDENT not in run.products():
        begin = ("--recipe", RECIPE, "--dtype", "fp32", "--seed", seed, "--no-report")
        chosen = [word for one in sets for word in ("--set", one)]
        mmmamba("seed", TEACHER, *words, *begin, "--overwrite", "--discard", *chosen)
        data = ("--data", out / "scenes" / "lessons.jsonl", "--image-root", out / "scenes")
        mmmamba("distill", *words, *data)
    mmmamba("eval", *words, "--from", STUDENT, "--suite", "scenes", "--data", out / "scenes")
    return run


def agreement(runs: dict[str, Run], out: Path) -> dict[str, dict[str, Any]]:
    """Each metric over all answer tokens, in percent, and its difference to the first run."""
    students = {name: run.open_product(STUDENT) for name, run in runs.items()}
    first, *others = runs
    teacher = runs[first].open_teacher()
    shares = by_lesson(teacher, students, out / "held-out" / "lessons.jsonl")
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for metric in COMPARISONS:
        for name in runs:
            found[name][metric] = round(percent(shares[name][metric]), 2)
        for name in others:
            one, other = shares[name][metric], shares[first][metric]
            found[name][f"{metric} above {first}"] = {
                "points": round(percent(one) - percent(other), 2),
                "interval": [round(end, 2) for end in interval(one, other)],
            }
    return found


def percent(shares: Shares) -> float:
    return 100 * sum(part for part, _ in shares) / sum(count for _, count in shares)


def interval(one: Shares, other: Shares) -> list[float]:
    """The 95 % interval of the difference in percent, over lessons drawn together."""
    sums = np.array([(a, b, count) for (a, count), (b, _) in zip(one, other, strict=True)])
    drawn = np.concatenate(
        [counts @ sums for counts in resample_counts(["lesson"] * len(sums), NUM_RESAMPLES, 0)]
    )
    ends: list[float] = np.percentile(
        100 * (drawn[:, 0] - drawn[:, 1]) / drawn[:, 2], [2.5, 97.5]
    ).tolist()
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--steps", nargs=3, type=int, default=[48, 64, 192])
    parser.add_argument("--lessons", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    load, began = os.getloadavg()[0], time.perf_counter()
    draw(given.out, given.lessons, given.seed)
    runs = {name: make_student(given.out, name, given.steps, given.seed) for name in given.variants}
    rows = agreement(runs, given.out)
    for name, run in runs.items():
        file = run.folder / "evals" / STUDENT / "scenes" / "result.json"
        rule = json.loads(file.read_text(encoding="utf-8"))["rules"][0]
        rows[name]["scenes accuracy"] = round(rule["metrics"]["mean"], 1)
        rows[name]["scenes interval"] = [round(x, 1) for x in rule["intervals"]["mean"]]
        rows[name]["parameters"] = run.product(STUDENT).parameters
    text = {
        "what": "students of scenes-teacher with several mixers, the same steps and lessons; "
        "percent over the answer tokens of held-out lessons, and accuracy on the suite",
        "command": "python " + " ".join(["benchmarks/mixer_students.py", *sys.argv[1:]]),
        "created": utc_timestamp(),
        "device": "CPU",
        "versions": package_versions(),
        "seed": given.seed,
        "steps": given.steps,
        "lessons": given.lessons,
        "seconds": round(time.perf_counter() - began),
        "load average before and after": [round(load, 1), round(os.getloadavg()[0], 1)],
        "students": rows,
    }
    written = json.dumps(text, indent=1) + "\n"
    if given.result is not None:
        atomic_write_text(given.result, written)
    print(written, end="")


if __name__ == "__main__":
    main()
