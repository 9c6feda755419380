"""A calibrated start against inherit+mimic: fidelity before training, and the losses of stage 1.

    python benchmarks/calibrated_seed.py [--inits inherit+mimic calibrated] [--steps 60]
        [--batch-size 16] [--every 10] [--held-out 48] [--seed 0] [--device cpu] [--out FILE]

Students of scenes-teacher with the recipe scenes-linear are seeded in fp32 on lessons drawn while
training (`scenes:lessons`), and learn stage 1 on equal batches, both by the commands of mmmamba.
Fidelity is that of the manifest: mixer outputs before W_O on the samples that calibration held out.
Losses are 1,000 x the mean squared error over held-out lessons, mean of the layers. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmmamba_cli.distill import METRICS, read_metrics
from mmmamba_cli.runs import Run
from mmmamba_cli.runs.manifest import command_line, package_versions, utc_timestamp

TEACHER, RECIPE, STAGE = "scenes-teacher", "scenes-linear", "stage1"
DATA = "scenes:lessons"
INITS = ("inherit+mimic", "calibrated")


def mmmamba(*words: object) -> float:
    """Run a command; the seconds that it took."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "mmmamba_cli", *map(str, words)], check=True, stdout=sys.stderr
    )
    return round(time.perf_counter() - started, 1)


def measure(folder: Path, init: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seed a student with `init` and train stage 1."""
    run = Run(folder / init)
    fields = {
        "data.train": DATA,
        "data.held_out": f"{DATA}?samples={options.held_out}",
        "data.workers": 0,
        # Few drawn lessons are longer than the recipe's max_length.
        "data.max_bad_share": 0.1,
        "mixer.init": init,
        f"stages.{STAGE}.steps": options.steps,
        f"stages.{STAGE}.batch_size": options.batch_size,
        f"stages.{STAGE}.evaluate_every": options.every,
        f"stages.{STAGE}.precision": "fp32",
        "seed": options.seed,
    }
    sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    common = ("--run", run.folder, "--recipe", RECIPE, *sets)
    seeding = mmmamba("seed", TEACHER, *common, "--dtype", "fp32", "--no-report")
    training = mmmamba("distill", *common, "--stage", STAGE, "--device", options.device)
    seeded, product = run.product("seed"), run.product(STAGE)
    curve = {
        row["step"]: round(row["held_out/loss"], 2)
        for row in read_metrics(run.product_folder(product.name) / METRICS)
        if "held_out/loss" in row
    }
    return {
        "init": init,
        "calibration": seeded.metrics.get("calibration"),
        "held_out_loss": curve,
        "seed_seconds": seeding,
        "distill_seconds": training,
    }


def means(row: dict[str, Any]) -> dict[str, float]:
    """Means over layers of the fidelity of a calibrated student."""
    layers = row["calibration"]["layers"]
    fields = ("cosine_mimic", "relative_mse_mimic", "cosine", "relative_mse")
    return {field: round(sum(one[field] for one in layers) / len(layers), 4) for field in fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inits", nargs="+", default=INITS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--every", type=int, default=10, help="Steps between held-out losses.")
    parser.add_argument("--held-out", type=int, default=48, help="Held-out lessons.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), init, options) for init in options.inits]
    result = {
        "what": "students of scenes-teacher before training and in stage 1, by their start",
        "command": f"python benchmarks/{command_line()}",
        "date": utc_timestamp()[:10],
        "device": options.device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load average before and after": [round(before, 1), round(os.getloadavg()[0], 1)],
        "versions": package_versions(),
        "seed": options.seed,
        "batch size": options.batch_size,
        "means over layers": [means(row) for row in rows if row["calibration"]],
        "rows": rows,
    }
    text = json.dumps(result, indent=2) + "\n"
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
